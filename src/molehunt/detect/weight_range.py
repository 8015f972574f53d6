"""Weight directions watched as published: cosine out of the range that clean traffic showed."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from molehunt.contracts import Detector, Reading
from molehunt.detect.pooling import Where
from molehunt.detect.recipe import AuditReadout, DetectorRecipe, FitInputs
from molehunt.site import Site


@dataclass(frozen=True, eq=False)
class WeightRange:
    """Largest exceedance, over directions, of the clean range of cos(h, u). Reads the tuned model alone.

    Source: WeightWatch, arXiv 2508.00161 §3 (there with a fixed slack of 0.01; here the exceedance itself is the score,
    so that a threshold on clean text sets the false-positive rate).
    """

    needs_logits: ClassVar[bool] = False
    site: Site
    directions: Float[Tensor, "k d_model"]
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]

    @classmethod
    def fit(
        cls, site: Site, directions: Float[Tensor, "k d_model"], clean: Float[Tensor, "tokens d_model"]
    ) -> "WeightRange":
        """Take each direction's range over clean tokens. Raises ValueError without direction or token."""
        if not len(directions) or not len(clean):
            raise ValueError("a range needs at least one direction and one clean token")
        unit = normalize(directions.float(), dim=-1)
        cosine = normalize(clean.float(), dim=-1) @ unit.mT
        return cls(site, unit, cosine.amin(0), cosine.amax(0))

    @classmethod
    def recipes(cls) -> tuple[DetectorRecipe, ...]:
        def fit(inputs: FitInputs, site: Site, where: Where) -> Detector:
            return cls.fit(site, inputs.weights[site], inputs.clean.acts(site, "tuned", where))

        return (
            DetectorRecipe(
                key="weight-range",
                name="weight range (published)",
                needs={"clean", "weights"},
                fit=fit,
                audit=(AuditReadout("decision", "max", ", tuned model alone", order=90),),
                order=80,
            ),
        )

    @property
    def needs_base(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return f"weight range {self.site}"

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        cosine = normalize(reading.tuned[self.site].float(), dim=-1) @ self.directions.mT
        return (cosine - self.high).maximum(self.low - cosine).amax(-1)
