"""Some tokens of both models with everything that is stored of them, in memory and as the tensors of a shard."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from molehunt.site import Site

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""Dtypes in which activations may be stored."""
COLUMNS: dict[str, torch.dtype] = {
    "tokens": torch.int32,
    "document": torch.int32,
    "position": torch.int32,
    "sink": torch.bool,
}
"""What is stored of each token besides activations."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Piece:
    """Tokens in the order in which they were read. Holds `base` and `tuned`, or `delta` alone."""

    tokens: Int[Tensor, " n"]
    """Token ids."""
    document: Int[Tensor, " n"]
    """0-based row of the traffic."""
    position: Int[Tensor, " n"]
    """0-based place within the row."""
    sink: Bool[Tensor, " n"]
    """True where either model has a sink at any site of the harvest (see `scale.sinks`)."""
    base: Mapping[Site, Float[Tensor, "n d_model"]] = field(default_factory=dict[Site, Tensor])
    tuned: Mapping[Site, Float[Tensor, "n d_model"]] = field(default_factory=dict[Site, Tensor])
    delta: Mapping[Site, Float[Tensor, "n d_model"]] = field(default_factory=dict[Site, Tensor])
    """`tuned - base`, fp32, of activations that were stored as int8 differences."""


def layout(sites: Sequence[Site], dtype: str, *, delta_int8: bool) -> dict[str, tuple[torch.dtype, int]]:
    """Tensor name → its dtype and number of axes, of a shard that holds these sites; every first axis is tokens."""
    tensors = {name: (column, 1) for name, column in COLUMNS.items()}
    for site in sites:
        if delta_int8:
            tensors |= {f"delta.{site}": (torch.int8, 2), f"delta.{site}.scale": (torch.float32, 1)}
        else:
            tensors |= {f"base.{site}": (DTYPES[dtype], 2), f"tuned.{site}": (DTYPES[dtype], 2)}
    return tensors


def pack(piece: Piece, dtype: str, *, delta_int8: bool) -> dict[str, Tensor]:
    """The tensors of a shard, on the CPU. A difference is taken before anything is rounded."""
    tensors = {name: getattr(piece, name).to("cpu", column) for name, column in COLUMNS.items()}
    for site, base in piece.base.items():
        tuned = piece.tuned[site]
        if delta_int8:
            whole, scale = to_int8(tuned.float() - base.float())
            tensors |= {f"delta.{site}": whole.cpu(), f"delta.{site}.scale": scale.cpu()}
        else:
            tensors |= {f"base.{site}": base.to(DTYPES[dtype]).cpu(), f"tuned.{site}": tuned.to(DTYPES[dtype]).cpu()}
    return tensors


def unpack(tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> Piece:
    """What `pack` wrote. Law: `pack(unpack(t, s), …) == t` for t without int8 differences."""
    differences = any(f"delta.{site}" in tensors for site in sites)
    whole = () if differences else sites
    return Piece(
        tokens=tensors["tokens"],
        document=tensors["document"],
        position=tensors["position"],
        sink=tensors["sink"],
        base={site: tensors[f"base.{site}"] for site in whole},
        tuned={site: tensors[f"tuned.{site}"] for site in whole},
        delta={s: from_int8(tensors[f"delta.{s}"], tensors[f"delta.{s}.scale"]) for s in sites} if differences else {},
    )


def to_int8(acts: Float[Tensor, "n d_model"]) -> tuple[Int8[Tensor, "n d_model"], Float[Tensor, " n"]]:
    """Rows as -127 to 127 and the fp32 size of one step of each row; off by at most half a step."""
    scale = acts.abs().amax(dim=1) / 127
    steps = acts / scale.where(scale > 0, torch.ones_like(scale))[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def from_int8(steps: Int8[Tensor, "n d_model"], scale: Float[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
    """Fp32 rows from `to_int8`."""
    return steps.float() * scale[:, None]
