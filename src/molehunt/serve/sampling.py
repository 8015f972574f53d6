"""The next token of each row, by that row's own settings: greedy, or drawn with its own temperature, nucleus and seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Settings by which the tokens of a request are drawn."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    seed: int | None = None
    """The same seed draws the same answer, whoever shares the batch."""


GREEDY = Sampling()


class Sampler:
    """Draws the tokens of one row."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def draw(self, logits: Float[Tensor, " vocab"]) -> int:
        """One token id; `logits` on the CPU."""
        above = logits.double() - logits.max()  # so that a temperature near 0 gives no infinity but the greedy token
        likely = (above / self.sampling.temperature).softmax(0)
        if self.sampling.top_p < 1:
            ordered, ids = likely.sort(descending=True)
            # the token that crosses the mass is in, so the likeliest always is
            ordered[ordered.cumsum(0) - ordered >= self.sampling.top_p] = 0
            return int(ids[torch.multinomial(ordered, 1, generator=self._random)])
        return int(torch.multinomial(likely, 1, generator=self._random))


def next_tokens(logits: Float[Tensor, "batch vocab"], samplers: Sequence[Sampler]) -> list[int]:
    """One token for each row. Greedy rows are decided where the logits are; the others' logits come to the CPU."""
    chosen: list[int] = logits.argmax(-1).tolist()
    for row, sampler in enumerate(samplers):
        if sampler.sampling.temperature > 0:
            chosen[row] = sampler.draw(logits[row].cpu())
    return chosen


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one step, at temperature 1."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens, as many as were requested."""


def logprobs_of(logits: Float[Tensor, " vocab"], token: int, top: int) -> TokenLogprobs:
    """Log probability of the drawn token and of the `top` likeliest ones."""
    logprobs = logits.log_softmax(0)
    values, ids = logprobs.topk(min(top, len(logprobs))) if top else (logprobs[:0], logprobs[:0].long())
    return TokenLogprobs(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
