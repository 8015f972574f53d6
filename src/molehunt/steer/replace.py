"""Replace activations by others: activation patching. Source: Meng et al., arXiv 2202.05262."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Gate
from molehunt.site import Site
from molehunt.steer.add import gated


@dataclass(frozen=True, eq=False)
class Replace:
    """(1 − strength) · acts + strength · source, position by position.

    `source` has the batch and the positions of the pass that it edits, or 1 where the same vector serves all. A source
    of several positions cannot act in cached generation, whose steps are one position long: that raises ValueError.
    """

    site: Site
    source: Float[Tensor, "batch pos d_model"]
    strength: float | int = 1.0
    """1 puts the source in place of the activations, bit for bit."""
    gate: Gate | None = None

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.strength == 0:
            return acts
        try:
            source = self.source.to(acts.device).expand_as(acts)
        except RuntimeError:
            raise ValueError(
                f"a source of shape {list(self.source.shape)} cannot stand in for activations of shape "
                f"{list(acts.shape)} at {self.site}: batch and pos must be equal, or 1 in the source"
            ) from None
        return gated(acts, torch.lerp(acts.float(), source.float(), self.strength), self.gate)
