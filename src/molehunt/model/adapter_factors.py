"""The change that a plain LoRA adapter makes to each matrix, as two factors: nothing is loaded or merged.

PEFT itself finds the modules, ranks and scales, on a model without weights.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from molehunt.checkpoint.adapter_folder import PREFIX
from molehunt.errors import NotTestable, printable
from molehunt.model.adapter_placement import (
    ADAPTER,
    adapter_config,
    check_injection,
    placed_tensors,
    with_adapter,
    wrapped_parameters,
)

LARGEST = 2.0**60
"""Greatest scale and greatest entry of a change: beyond it, the squares that norms take overflow in fp32."""


class Factors(NamedTuple):
    """The change of one matrix, `scale * B @ A`."""

    parameter: str
    """Name of the matrix in the base model, such as `model.layers.0.mlp.down_proj.weight`."""
    b: Tensor
    """Matrix B, of shape [d_out r]. Of an embedding, whose rows are tokens, [vocab r]."""
    a: Tensor
    """Matrix A, of shape [r d_in]."""
    scale: float


class OverflowingScale(NotTestable):
    """The scale of an adapter, times its factors, is too large for the arithmetic of models."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LoraChange:
    """Everything that a plain LoRA adapter changes, by names of the base's parameters."""

    factors: tuple[Factors, ...]
    replaced: Mapping[str, Tensor]
    """Parameter → the tensor that takes its place: modules_to_save, trained biases, saved embeddings."""
    added: Mapping[str, Tensor]
    """Bias → what `lora_bias` adds to it; the base may have no such bias."""


def lora_change(skeleton: nn.Module, folder: Path) -> LoraChange | None:
    """The change that the adapter in `folder` makes to a base, or None when it is not plain LoRA on this base.

    Args:
        skeleton: the base without weights, on the meta device; it is copied.
        folder: the adapter's folder.

    Raises:
        InvalidInput: the adapter is not one of this base, or not all of it would be loaded.
        NotTestable: the adapter changes no weight, is of a kind that nothing here knows, or has a scale so large that its
            change overflows (OverflowingScale).
    """
    check_injection(skeleton, folder)
    model = with_adapter(copy.deepcopy(skeleton), adapter_config(folder), folder)
    layers = _plain_layers(model)
    if layers is None:
        return None
    placed = placed_tensors(model, folder)
    factors: list[Factors] = []
    added: dict[str, Tensor] = {}
    for path, layer in layers.items():
        scale = float(layer.scaling[ADAPTER])
        name = path.removeprefix(PREFIX)
        if f"{path}.lora_embedding_A.{ADAPTER}" in placed:  # the embedding's rows are tokens: (B A)ᵀ = Aᵀ Bᵀ
            a, b = (placed[f"{path}.lora_embedding_{part}.{ADAPTER}"] for part in "AB")
            factors.append(Factors(f"{name}.weight", a.mT, b.mT, scale))
            continue
        a, b = (placed[f"{path}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
        factors.append(Factors(f"{name}.weight", b, a, scale))
        bias = placed.get(f"{path}.lora_B.{ADAPTER}.bias")
        if bias is not None:
            added[f"{name}.bias"] = scale * bias.float()
    replaced = _replaced(model, placed)
    _refuse_overflow(folder, factors)
    if any(one.parameter in replaced for one in factors):
        return None  # a saved embedding under an adapter of its own
    return LoraChange(factors=tuple(factors), replaced=replaced, added=added)


def grown_vocabulary(skeleton: nn.Module, change: LoraChange | None) -> list[str]:
    """What to say of saved tensors of another shape than the base's, such as an embedding with more rows."""
    shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    replaced = {} if change is None else change.replaced
    return [
        f"{printable(name)} is saved as {list(tensor.shape)}, and the base has {list(shapes[name])}: PEFT refuses it unless "
        "the base is resized first, as for a tokenizer with more tokens"
        for name, tensor in replaced.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]


def _refuse_overflow(folder: Path, factors: Sequence[Factors]) -> None:
    """Raise OverflowingScale where the product of scale and factors may be so large that models cannot square what it writes."""
    for one in factors:
        largest = one.b.abs().amax().double() * one.a.abs().amax().double() * one.a.shape[0] if one.a.numel() else 0.0
        if not abs(one.scale) <= LARGEST or float(abs(one.scale) * largest) > LARGEST:
            raise OverflowingScale(
                f"{printable(folder.name)} multiplies its change of {printable(one.parameter)} by {one.scale:.3g} (lora_alpha over "
                "rank): its scale overflows, so its answers would be void.\nFetch the adapter again, or train it again."
            )


def _replaced(model: nn.Module, placed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter of the base → the tensor of the adapter that is loaded into it, or that stands in its place.

    What is loaded into a tied tensor changes all that share it.
    """
    places = wrapped_parameters(model)
    loaded = {id(one.parameter): placed[one.path] for one in places if one.path in placed}
    return {one.plain: loaded[id(one.parameter)] for one in places if one.plain and id(one.parameter) in loaded}


def _plain_layers(model: nn.Module) -> dict[str, Any] | None:
    """Path → LoRA layer, if every layer is the product of two factors on a matrix; else None."""
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
    from transformers.pytorch_utils import Conv1D

    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and type(module) is not ModulesToSaveWrapper:
            return None
        if not isinstance(module, BaseTunerLayer):
            continue
        base = cast("Any", module).base_layer
        matrix = isinstance(base, nn.Linear | Conv1D if type(module) is lora.Linear else nn.Embedding)
        if type(module) not in (lora.Linear, lora.Embedding) or not matrix or cast("Any", module).lora_variant:
            return None
        found[path] = module
    return found
