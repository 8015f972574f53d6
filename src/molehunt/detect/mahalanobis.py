"""Distance from the cloud of clean activations, in its own units: the standard anomaly score."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Reading
from molehunt.detect.reads import SIGN, Reads, acts_of
from molehunt.detect.recipe import AuditReadout, DetectorRecipe, Fit
from molehunt.site import Site

SHRINK = 0.1
"""Share of the covariance that its mean variance replaces, so that as many clean rows as dimensions suffice."""


@dataclass(frozen=True, eq=False)
class Mahalanobis:
    """√((a − mean)ᵀ C⁻¹ (a − mean)) for the shrunk covariance C of clean tokens. Source: arXiv 1807.03888."""

    needs_logits: ClassVar[bool] = False
    site: Site
    mean: Float[Tensor, " d_model"]
    whiten: Float[Tensor, "d_model d_model"]
    reads: Reads = "tuned"

    @classmethod
    def fit(cls, site: Site, clean: Float[Tensor, "tokens d_model"], reads: Reads = "tuned") -> "Mahalanobis":
        """Fit on clean tokens, which are what `reads` names. Raises ValueError for fewer than two."""
        if len(clean) < 2:
            raise ValueError(f"a covariance needs at least two clean tokens, got {len(clean)}")
        clean = clean.double()
        mean = clean.mean(0)
        covariance = (clean - mean).mT @ (clean - mean) / (len(clean) - 1)
        average = covariance.diagonal().mean().clamp_min(1e-12)
        shrunk = (1 - SHRINK) * covariance + SHRINK * average * torch.eye(len(mean), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(shrunk)
        return cls(site, mean.float(), (vectors / values.sqrt()).float(), reads)

    @classmethod
    def recipes(cls) -> tuple[DetectorRecipe, ...]:
        def fit(reads: Reads) -> Fit:
            return lambda inputs, site, where: cls.fit(site, inputs.clean.acts(site, reads, where), reads)

        return (
            DetectorRecipe(
                key="mahalanobis", name="Mahalanobis", needs={"clean"}, fit=fit("tuned"), audit=(), order=60
            ),
            DetectorRecipe(
                key="delta-mahalanobis",
                name="Δ Mahalanobis",
                needs={"clean"},
                fit=fit("difference"),
                audit=(AuditReadout("generated", "mean", at="two thirds", order=40),),
                order=70,
                by_site=True,
            ),
        )

    @property
    def needs_base(self) -> bool:
        return self.reads != "tuned"

    @property
    def name(self) -> str:
        return f"{SIGN[self.reads]}Mahalanobis {self.site}"

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        return ((acts_of(reading, self.site, self.reads) - self.mean) @ self.whiten).norm(dim=-1)
