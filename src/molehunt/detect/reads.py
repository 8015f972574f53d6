"""The activations of a reading that a score is made of: one model's, or the difference."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Reading
from molehunt.site import Site

Reads = Literal["tuned", "base", "difference"]
SIGN: dict[Reads, str] = {"tuned": "", "base": "base ", "difference": "Δ "}
"""Prefix of a detector's name."""


def acts_of(reading: Reading, site: Site, reads: Reads) -> Float[Tensor, "batch pos d_model"]:
    """Activations in fp32: of one model, or tuned − base."""
    if reads == "difference":
        return reading.tuned[site].float() - reading.base[site].float()
    return (reading.tuned if reads == "tuned" else reading.base)[site].float()
