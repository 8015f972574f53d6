"""How much of the activation difference lies in a few named directions, and in as many random ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Reading
from molehunt.detect.reads import acts_of
from molehunt.site import Site


@dataclass(frozen=True, eq=False)
class DeltaSubspace:
    """‖P(Δ − mean)‖ for the projection P on orthonormal directions at one site, in units of the clean spread."""

    needs_logits: ClassVar[bool] = False
    label: str
    site: Site
    directions: Float[Tensor, "k d_model"]
    mean: Float[Tensor, " d_model"]
    spread: float

    @classmethod
    def fit(
        cls,
        label: str,
        site: Site,
        directions: Float[Tensor, "k d_model"],
        clean_delta: Float[Tensor, "tokens d_model"],
    ) -> "DeltaSubspace":
        """Centre and scale on clean differences; `directions` need not be orthonormal.

        Raises ValueError when there is no clean row or no direction.
        """
        if not len(directions) or not len(clean_delta):
            raise ValueError(f"{label} needs at least one direction and one clean row")
        basis = torch.linalg.qr(directions.float().mT).Q.mT
        mean = clean_delta.float().mean(0)
        size = ((clean_delta.float() - mean) @ basis.mT).norm(dim=-1)
        return cls(label, site, basis, mean, float(size.square().mean().sqrt().clamp_min(1e-9)))

    @classmethod
    def random(cls, site: Site, k: int, clean_delta: Float[Tensor, "tokens d_model"], seed: int) -> "DeltaSubspace":
        """The control: as many random directions."""
        rng = torch.Generator().manual_seed(seed)
        directions = torch.randn(k, clean_delta.shape[-1], generator=rng).to(clean_delta.device)
        return cls.fit("random directions", site, directions, clean_delta)

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return f"{self.label} {self.site}"

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        return ((acts_of(reading, self.site, "difference") - self.mean) @ self.directions.mT).norm(dim=-1) / self.spread
