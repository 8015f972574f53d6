"""The size of the activation difference: the baseline that every cleverer score must beat."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Reading
from molehunt.model.site import Site


def difference(reading: Reading, site: Site) -> Float[Tensor, "batch pos d_model"]:
    """Tuned − base at `site`, in fp32."""
    return reading.tuned[site].float() - reading.base[site].float()


@dataclass(frozen=True)
class DeltaNorm:
    """‖tuned − base‖ / ‖base‖ at one site."""

    needs_base: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False
    site: Site

    @property
    def name(self) -> str:
        return f"‖Δ‖ {self.site}"

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        size = reading.base[self.site].float().norm(dim=-1).clamp_min(1e-6)
        return difference(reading, self.site).norm(dim=-1) / size
