"""Which activations of a reading a score is made of."""

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Reading
from molehunt.site import Site

Reads = Literal["tuned", "base", "difference"]
READS: tuple[Reads, ...] = get_args(Reads)
SIGN: dict[Reads, str] = {"tuned": "", "base": "base ", "difference": "Δ "}
"""In front of a detector's name."""


def acts_of(reading: Reading, site: Site, reads: Reads) -> Float[Tensor, "batch pos d_model"]:
    """Activations in fp32: of one model, or tuned − base."""
    if reads == "difference":
        return reading.tuned[site].float() - reading.base[site].float()
    return (reading.tuned if reads == "tuned" else reading.base)[site].float()
