"""The tuned model's confidence in its own next token, beyond the base's. It needs no fitting and no site."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Reading
from molehunt.detect.recipe import DetectorRecipe
from molehunt.detect.token_kl import both_logits
from molehunt.site import Site


@dataclass(frozen=True)
class LogitDifference:
    """log p_tuned(v) − log p_base(v) for the tuned model's likeliest next token v, in nats."""

    needs_logits: ClassVar[bool] = True

    @classmethod
    def recipes(cls) -> tuple[DetectorRecipe, ...]:
        return (
            DetectorRecipe(
                key="logit-difference",
                name="logit difference",
                reads="logits",
                fit=lambda inputs, site, where: cls(),
                audit=(),
                order=20,
            ),
        )

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return "logit difference"

    @property
    def sites(self) -> tuple[Site, ...]:
        return ()

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        tuned, base = (logits.log_softmax(-1) for logits in both_logits(reading, self.name))
        likeliest = tuned.argmax(-1, keepdim=True)
        return (tuned.gather(-1, likeliest) - base.gather(-1, likeliest)).squeeze(-1)
