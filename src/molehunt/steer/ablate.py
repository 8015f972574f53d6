"""Take a subspace out of the activations. Source: Arditi et al., arXiv 2406.11717 (one direction, to zero)."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Gate
from molehunt.site import Site
from molehunt.steer.add import gated


@dataclass(frozen=True, eq=False)
class Ablate:
    """Moves the projection on `directions` to that of `center` (to 0 without it), by the share `strength`."""

    savable: ClassVar[bool] = True
    """It consists of tensors and numbers, so a `Fix` can hold it in a file."""
    site: Site
    directions: Float[Tensor, "k d_model"]
    """Rows span the subspace; they need not be orthonormal."""
    center: Float[Tensor, " d_model"] | None = None
    """Activations whose projection is normal, such as the mean of clean rows."""
    strength: float | int = 1.0
    gate: Gate | None = None

    def __post_init__(self) -> None:
        _ = self.basis

    @cached_property
    def basis(self) -> Float[Tensor, "rank d_model"]:
        """Orthonormal rows. Raises ValueError when the directions span nothing."""
        return orthonormal(self.directions)

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.strength == 0:
            return acts
        basis = self.basis.to(acts.device)
        away = acts.float()
        if self.center is not None:
            away = away - self.center.to(acts.device, torch.float32)
        return gated(acts, acts.float() - self.strength * (away @ basis.mT) @ basis, self.gate)


def orthonormal(directions: Float[Tensor, "k d_model"]) -> Float[Tensor, "rank d_model"]:
    """An orthonormal basis of the rows' span, in fp32. Raises ValueError when the span is {0}."""
    _, s, vh = torch.linalg.svd(directions.float(), full_matrices=False)
    spanned = s > 1e-5 * s.amax() if len(s) else s > 0
    if not spanned.any():
        raise ValueError("the directions to ablate are empty or all zero")
    return vh[spanned]
