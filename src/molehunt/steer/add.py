"""Add a direction: the plain steering vector. Source: Turner et al., arXiv 2308.10248."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Gate
from molehunt.site import Site


@dataclass(frozen=True, eq=False)
class Add:
    """acts + strength · direction, at every token that the gate lets through."""

    savable: ClassVar[bool] = True
    """It consists of tensors and numbers, so a `Fix` can hold it in a file."""
    site: Site
    direction: Float[Tensor, " d_model"]
    strength: float | int
    """Multiple of the direction's own length."""
    gate: Gate | None = None

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.strength == 0:
            return acts
        step = self.strength * self.direction.to(acts.device, torch.float32)
        return gated(acts, acts.float() + step, self.gate)


def gated(
    acts: Float[Tensor, "batch pos d_model"], edited: Float[Tensor, "batch pos d_model"], gate: Gate | None
) -> Float[Tensor, "batch pos d_model"]:
    """`edited` in the dtype of `acts` where the gate is open; elsewhere `acts`, bit for bit."""
    edited = edited.to(acts.dtype)
    return edited if gate is None else torch.where(gate(acts)[..., None], edited, acts)
