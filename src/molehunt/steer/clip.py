"""Hold projections inside the range that clean traffic shows. Source: WeightWatch, arXiv 2508.00161."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from molehunt.contracts import Gate
from molehunt.site import Site
from molehunt.steer.add import gated


@dataclass(frozen=True, eq=False)
class Clip:
    """Moves each activation so that its projection on direction i lies in [lo[i], hi[i]], by the share `strength`.

    Directions act one after the other, in the order given, so only orthogonal ones all end inside their range. A token
    inside every range is left as it is, bit for bit.
    """

    savable: ClassVar[bool] = True
    """It consists of tensors and numbers, so a `Fix` can hold it in a file."""
    site: Site
    directions: Float[Tensor, "k d_model"]
    """Used at unit length."""
    lo: Float[Tensor, " k"]
    hi: Float[Tensor, " k"]
    strength: float | int = 1.0
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if not bool((self.lo <= self.hi).all()):
            raise ValueError("every lo must be at most its hi")

    @cached_property
    def units(self) -> Float[Tensor, "k d_model"]:
        return normalize(self.directions.float(), dim=-1)

    @cached_property
    def overlap(self) -> Float[Tensor, "k k"]:
        """Cosines between the directions: how far one's correction moves the others' projections."""
        return self.units @ self.units.mT

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.strength == 0:
            return acts
        units, overlap, lo, hi = (t.to(acts.device) for t in (self.units, self.overlap, self.lo, self.hi))
        projections = acts.float() @ units.mT
        steps: list[Tensor] = []
        for i in range(len(units)):  # in k numbers per token, not in d_model
            held = projections[..., i].clamp(lo[i], hi[i])
            steps.append(self.strength * (held - projections[..., i]))
            projections = projections + steps[-1][..., None] * overlap[i]
        step = torch.stack(steps, dim=-1)
        return gated(acts, acts.float() + step @ units, self.gate)
