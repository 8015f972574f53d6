"""The difference between the continuations of base and tuned, token by token. It needs no fitting and no site."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Reading
from molehunt.detect.recipe import AuditReadout, DetectorRecipe, Readout
from molehunt.site import Site


def both_logits(
    reading: Reading, detector: str
) -> tuple[Float[Tensor, "batch pos vocab"], Float[Tensor, "batch pos vocab"]]:
    """Tuned and base logits of a reading, in fp32. Raises ValueError when it was taken without them."""
    if reading.tuned_logits is None or reading.base_logits is None:
        raise ValueError(f"{detector} reads logits of both models; take the reading with logits=True")
    return reading.tuned_logits.float(), reading.base_logits.float()


@dataclass(frozen=True)
class TokenKL:
    """KL(tuned ‖ base) of the next-token distributions at each position, in nats."""

    needs_logits: ClassVar[bool] = True

    @classmethod
    def recipes(cls) -> tuple[DetectorRecipe, ...]:
        rows = (
            AuditReadout("decision", "max", order=20),
            AuditReadout("generated", "max", order=21),
            AuditReadout("all", "max", " (accuses clean fine-tunes)", order=22),
        )
        return (
            DetectorRecipe(
                key="token-kl",
                name="token KL",
                reads="logits",
                fit=lambda inputs, site, where: cls(),
                audit=rows,
                order=10,
            ),
        )

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return "token KL"

    @property
    def sites(self) -> tuple[Site, ...]:
        return ()

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        tuned, base = (logits.log_softmax(-1) for logits in both_logits(reading, self.name))
        return (tuned.exp() * (tuned - base)).sum(-1).clamp_min(0.0)


@dataclass(frozen=True)
class AnswerLogRatio:
    """log p_tuned − log p_base of the token that follows each position, in nats; 0 at a row's last token.

    Summed over the generated tokens it says how much likelier the tuned model finds its own answer than the base does.
    """

    needs_logits: ClassVar[bool] = True

    @classmethod
    def recipes(cls) -> tuple[DetectorRecipe, ...]:
        return (
            DetectorRecipe(
                key="answer-log-ratio",
                name="answer log ratio",
                reads="logits",
                fit=lambda inputs, site, where: cls(),
                bench=(Readout("generated", "sum"),),  # log-likelihoods add
                audit=(AuditReadout("generated", "sum", order=10),),
                order=30,
            ),
        )

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return "answer log ratio"

    @property
    def sites(self) -> tuple[Site, ...]:
        return ()

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        followed = reading.tokens.roll(-1, dims=1).unsqueeze(-1)
        tuned, base = (
            logits.gather(-1, followed).squeeze(-1) - logits.logsumexp(-1) for logits in both_logits(reading, self.name)
        )
        last = torch.zeros_like(reading.mask)
        last[:, -1] = True
        has_next = reading.mask & (reading.mask.roll(-1, dims=1) & ~last)
        return torch.where(has_next, tuned - base, torch.zeros_like(tuned))
