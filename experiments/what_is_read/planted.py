"""Changes of known size in known matrices, and what really differs between two models in memory.

Nothing here asks Molehunt which matrices there are: the truth must not come from what is judged by it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

SIGMAS = (0.9, 1.1, 1.3, 1.5)
"""Spectral norms of the planted changes, in the order of the matrices; the weights' own are between 3 and 5."""
EXPERT = 2
"""The expert that is changed where a parameter holds several."""
IN_BLOCK = re.compile(r"(^|\.)(layers|layer|h|blocks|block)\.1\.")
OTHER_TOWER = re.compile(r"(^|\.)(vision|visual|encoder\.(?!layer\.)|adapter_list)")
WRITERS = (
    "o_proj", "out_proj", "dense", "c_proj", "down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "attention.output",
    "feed_forward.value", "proj_down", "linear_out", "output_linear", "SelfAttention.o", "DenseReluDense.wo",
    "output.dense",
)  # fmt: skip
"""Ends of the names of matrices that write to the residual stream."""
STATE_SPACE = ("mamba", "mamba2", "falcon_mamba")
"""Model types whose writers PEFT refuses to give factors, so that an adapter changes what reads."""


@dataclass(frozen=True, eq=False)
class Plant:
    """A change of rank 1 in one matrix."""

    name: str
    """Name of the parameter in memory."""
    expert: int | None
    sigma: float
    write: Tensor
    """Unit vector along the matrix's first dimension."""
    read: Tensor

    @property
    def change(self) -> Tensor:
        return self.sigma * torch.outer(self.write, self.read)


@dataclass(frozen=True)
class Change:
    """What differs in one matrix, measured between two models in memory."""

    name: str
    layer: int | None
    sigma: float
    """Largest singular value; the norm of what is no matrix."""
    rel_norm: float


def plants(model: nn.Module, *, only_linear: bool = False, seed: int = 5) -> list[Plant]:
    """A change for each writing matrix of block 1, at most `len(SIGMAS)` of them.

    Args:
        model: the base.
        only_linear: leave out what no adapter for linear modules can change, such as experts in one parameter.
        seed: seed of the directions.

    Raises:
        ValueError: the model has no such matrix, so that nothing could be planted.
    """
    rng, found = torch.Generator().manual_seed(seed), list[Plant]()
    reads = only_linear and cast("Any", model).config.model_type in STATE_SPACE
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        inside = IN_BLOCK.search(name) and not OTHER_TOWER.search(name)
        known = name.removesuffix(".weight").endswith("in_proj" if reads else WRITERS)
        if not inside or not known or len(shape) not in (2, 3) or (only_linear and len(shape) == 3):
            continue
        vectors = [torch.randn(n, generator=rng) for n in shape[-2:]]
        write, read = (vector / vector.norm() for vector in vectors)
        found.append(Plant(name, EXPERT if len(shape) == 3 else None, SIGMAS[len(found)], write, read))
        if len(found) == len(SIGMAS):
            break
    if not found:
        raise ValueError(f"{type(model).__name__} has no matrix in block 1 whose name says that it writes")
    return found


@torch.no_grad()
def plant_(model: nn.Module, what: Sequence[Plant]) -> None:
    """Add the changes to a model in memory."""
    parameters = dict(model.named_parameters())
    for one in what:
        target = parameters[one.name] if one.expert is None else parameters[one.name][one.expert]
        target += one.change.to(target.dtype)


@torch.no_grad()
def changes(base: nn.Module, tuned: nn.Module) -> list[Change]:
    """Every matrix (each expert for itself) and every vector that differs between two models of one architecture."""
    after, found = dict(tuned.named_parameters()), list[Change]()
    for name, parameter in base.named_parameters():
        pair = parameter.float(), after[name].float()
        if pair[0].shape != pair[1].shape:  # a resized vocabulary: the shared rows
            rows = min(len(one) for one in pair)
            pair = pair[0][:rows], pair[1][:rows]
        experts = pair[0].ndim == 3 and "expert" in name
        for before, now in zip(*pair, strict=True) if experts else [pair]:
            difference = now - before
            if not bool(difference.any()):
                continue
            layer = re.search(r"\.(\d+)\.", name)
            matrix = difference.ndim == 2
            top = torch.linalg.matrix_norm(difference, ord=2) if matrix else difference.norm()
            size = float(before.norm())
            rel = float(difference.norm()) / size if size else float("inf")
            found.append(Change(name, int(layer[1]) if layer else None, float(top), rel))
    return found


@torch.no_grad()
def logits_of(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """What follows each position of each row, one row at a time and without a cache."""
    run, kind = cast("Any", model), cast("Any", model).config
    extra = {"decoder_input_ids": True} if getattr(kind, "is_encoder_decoder", False) else {"use_cache": False}
    found: list[Tensor] = []
    for row in rows:
        ids = torch.tensor([list(row)])
        options = {"decoder_input_ids": ids} if "decoder_input_ids" in extra else extra
        output = run(input_ids=ids, **options)
        found.append((output.logits if hasattr(output, "logits") else output.last_hidden_state)[0].float())
    return found
