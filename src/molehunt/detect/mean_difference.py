"""Position along the mean shift between two groups of tokens, in clean standard deviations."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from molehunt.contracts import Detector, Reading
from molehunt.detect.pooling import Where
from molehunt.detect.reads import SIGN, Reads, acts_of
from molehunt.detect.recipe import DetectorRecipe, Fit, FitInputs
from molehunt.site import Site


@dataclass(frozen=True, eq=False)
class MeanDifference:
    """The baseline a dictionary must beat: how far along clean → suspect a token lies."""

    needs_logits: ClassVar[bool] = False
    site: Site
    clean_mean: Float[Tensor, " d_model"]
    direction: Float[Tensor, " d_model"]
    """Unit direction over the clean standard deviation along it."""
    reads: Reads = "tuned"

    @classmethod
    def fit(
        cls,
        site: Site,
        acts: Float[Tensor, "tokens d_model"],
        suspect: Bool[Tensor, " tokens"],
        reads: Reads = "tuned",
    ) -> "MeanDifference":
        """Fit on the `fit` split; `acts` are what `reads` names. Raises ValueError unless both kinds of token are present."""
        if suspect.all() or not suspect.any():
            raise ValueError("mean difference needs clean and suspect tokens; got only one kind")
        clean = acts[~suspect].float()
        unit = normalize(acts[suspect].float().mean(0) - clean.mean(0), dim=0)
        return cls(site, clean.mean(0), unit / (clean @ unit).std(correction=0).clamp_min(1e-9), reads)

    @classmethod
    def recipes(cls) -> tuple[DetectorRecipe, ...]:
        def recipe(key: str, reads: Reads, order: int) -> DetectorRecipe:
            return DetectorRecipe(
                key=key,
                name=f"{SIGN[reads]}mean difference",
                needs={"labels"},
                fit=_fit(reads),
                order=order,
                by_site=True,
                directions=lambda detector: detector.direction[None],
            )

        return recipe("mean-difference", "tuned", 100), recipe("delta-mean-difference", "difference", 110)

    @property
    def needs_base(self) -> bool:
        return self.reads != "tuned"

    @property
    def name(self) -> str:
        return f"{SIGN[self.reads]}mean difference {self.site}"

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        return (acts_of(reading, self.site, self.reads) - self.clean_mean) @ self.direction


def _fit(reads: Reads) -> Fit:
    def fit(inputs: FitInputs, site: Site, where: Where) -> Detector | None:
        if inputs.labelled is None:
            return None
        return MeanDifference.fit(site, inputs.labelled.rows.acts(site, reads, where), inputs.labelled.suspect, reads)

    return fit
