"""The size of the activation difference: the baseline that every cleverer score must beat."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Reading
from molehunt.detect.reads import acts_of
from molehunt.detect.recipe import AuditReadout, DetectorRecipe
from molehunt.site import Site


@dataclass(frozen=True)
class DeltaNorm:
    """‖tuned − base‖ / ‖base‖ at one site."""

    needs_logits: ClassVar[bool] = False
    site: Site

    @classmethod
    def recipes(cls) -> tuple[DetectorRecipe, ...]:
        return (
            DetectorRecipe(
                key="delta-norm",
                name="‖Δ‖",
                fit=lambda inputs, site, where: cls(site),
                audit=(AuditReadout("decision", "max", order=50),),
                order=40,
                by_site=True,
            ),
        )

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return f"‖Δ‖ {self.site}"

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        size = reading.base[self.site].float().norm(dim=-1).clamp_min(1e-6)
        return acts_of(reading, self.site, "difference").norm(dim=-1) / size
