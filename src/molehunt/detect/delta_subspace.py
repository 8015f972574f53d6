"""The size of the activation difference along a few named directions, and along as many random ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Detector, Reading
from molehunt.detect.pooling import Where
from molehunt.detect.reads import acts_of
from molehunt.detect.recipe import AuditReadout, DetectorRecipe, FitInputs
from molehunt.site import Site

PCA_RANK = 4
ALONG_WEIGHTS = "Δ along weight directions"
WITHOUT_LABELS = ", fitted on the traffic without labels"


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

    @classmethod
    def recipes(cls) -> tuple[DetectorRecipe, ...]:
        along = (
            AuditReadout("generated", "mean", at="two thirds", order=30),
            AuditReadout("decision", "max", order=80),
        )
        return (
            DetectorRecipe(
                key="delta-pca",
                name="Δ PCA-4",
                needs={"clean"},
                fit=_pca,
                audit=(AuditReadout("decision", "max", WITHOUT_LABELS, order=60),),
                order=50,
                directions=_directions,
            ),
            DetectorRecipe(
                key="weight-directions",
                name=ALONG_WEIGHTS,
                needs={"clean", "weights"},
                fit=_along_weights,
                audit=along,
                order=90,
                directions=_directions,
            ),
            DetectorRecipe(
                key="random-direction",
                name="random direction of Δ",
                needs={"clean"},
                fit=lambda inputs, site, where: _random(inputs, site, where, 1),
                audit=(),
                order=900,
                control=True,
                directions=_directions,
            ),
            DetectorRecipe(
                key="random-directions",
                name="random directions of Δ",
                needs={"clean"},
                fit=lambda inputs, site, where: _random(inputs, site, where, PCA_RANK),
                bench=(),
                audit=(AuditReadout("decision", "max", ", control", order=70),),
                order=940,
                control=True,
            ),
        )

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


def _pca(inputs: FitInputs, site: Site, where: Where) -> Detector:
    clean = inputs.clean.acts(site, "difference", where)
    seen = inputs.labelled.rows if inputs.labelled is not None else inputs.traffic
    both = clean if seen is None else torch.cat([clean, seen.acts(site, "difference", where)])
    k = min(PCA_RANK, *both.shape)
    components = torch.linalg.svd(both - both.mean(0), full_matrices=False).Vh[:k]
    return DeltaSubspace.fit(f"Δ PCA-{k}", site, components, clean)


def _along_weights(inputs: FitInputs, site: Site, where: Where) -> Detector:
    clean = inputs.clean.acts(site, "difference", where)
    return DeltaSubspace.fit(ALONG_WEIGHTS, site, inputs.weights[site], clean)


def _random(inputs: FitInputs, site: Site, where: Where, k: int) -> Detector:
    clean = inputs.clean.acts(site, "difference", where)
    return DeltaSubspace.random(site, min(k, clean.shape[-1]), clean, inputs.seed)


def _directions(detector: DeltaSubspace) -> Float[Tensor, "k d_model"]:
    return detector.directions
