"""LoRA adapters as factors: the change that PEFT would add to each matrix, without computing or merging it."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from molehunt.checkpoint.lora_settings import matching
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput, NotTestable, printable

PREFIX = "base_model.model."


class Factors(NamedTuple):
    """The change of one matrix, `scale * B @ A`. Its rows write to the residual stream."""

    module: str
    """Module path in the base model, such as `model.layers.0.mlp.down_proj`."""
    b: Tensor
    """Matrix B, of shape [d_out r]."""
    a: Tensor
    """Matrix A, of shape [r d_in]."""
    scale: float


def lora_factors(adapter: Checkpoint) -> Iterator[Factors]:
    """The factors of every module of a LoRA adapter folder, one at a time.

    Raises:
        InvalidInput: a factor without its partner, or of the wrong shape.
        NotTestable: factors of embeddings or convolutions, which are not matrices of a decoder block.
    """
    settings = adapter.lora
    for name in adapter.names():
        if "lora_embedding" in name:
            raise NotTestable(f"{printable(name)}: LoRA on an embedding is not read; merge the adapter and audit that.")
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        partner = name.removesuffix("A.weight") + "B.weight"
        if partner not in adapter.names():
            raise InvalidInput(f"the adapter has {printable(name)} and no {printable(partner)}")
        a, b = adapter.tensor(name), adapter.tensor(partner)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise InvalidInput(
                f"the factors of {printable(module)} are {list(b.shape)} and {list(a.shape)}: no product"
            )
        rank = int(matching(settings.rank_pattern, module, settings.r))
        if a.shape[0] != rank:
            raise InvalidInput(f"{printable(module)} has rank {a.shape[0]}; adapter_config.json says {rank}")
        yield Factors(module, b, a, settings.scale_of(module))


def other_tensors(adapter: Checkpoint) -> tuple[str, ...]:
    """Names of the tensors that the adapter replaces completely: modules_to_save and trained biases."""
    return tuple(name for name in adapter.names() if ".lora_" not in name)
