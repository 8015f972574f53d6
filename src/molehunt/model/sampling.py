"""The next token of each row, by that row's own settings: greedy or drawn, with its own nucleus, penalty and seed."""

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
    top_k: int = 0
    """Draw among this many of the likeliest tokens; 0 draws among all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that the prompt or the answer has, and multiplies their negative ones."""
    seed: int | None = None
    """The same seed draws the same answer, whoever shares the batch."""


GREEDY = Sampling()
LEAST_LOGPROB = -9999.0
"""What stands for the log probability of a token that the model rules out."""


class Sampler:
    """Draws the tokens of one row."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = ()) -> None:
        """`prompt` counts for the repetition penalty, as the tokens do that are drawn."""
        self.sampling = sampling
        self._repeated = set(prompt) if sampling.repetition_penalty != 1 else None
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether it takes the token with the highest logit, so that nothing has to be drawn."""
        return self.sampling.temperature == 0 and self._repeated is None

    def draw(self, logits: Float[Tensor, " vocab"]) -> int:
        """One token id; `logits` on the CPU."""
        logits = logits.double()
        if self._repeated is None:
            return self._drawn(logits)
        token = self._drawn(self._penalised(logits, sorted(self._repeated)))
        self._repeated.add(token)
        return token

    def _penalised(self, logits: Float[Tensor, " vocab"], repeated: Sequence[int]) -> Float[Tensor, " vocab"]:
        """The logits as the processor of transformers leaves them, and finite, however extreme the penalty is."""
        penalty, ids = self.sampling.repetition_penalty, torch.tensor(repeated)
        found = logits[ids]
        found = torch.where(found < 0, found * penalty, found / penalty)
        most = torch.finfo(found.dtype).max
        return logits.index_copy(0, ids, found.clamp(-most, most))

    def _drawn(self, logits: Float[Tensor, " vocab"]) -> int:
        sampling = self.sampling
        if sampling.temperature == 0:
            return int(logits.argmax())
        if 0 < sampling.top_k < len(logits):  # all that tie with the last of them are in
            ids = (logits >= logits.topk(sampling.top_k).values[-1]).nonzero()[:, 0]
            return int(ids[self._among(logits[ids])])
        return self._among(logits)

    def _among(self, logits: Float[Tensor, " tokens"]) -> int:
        """The place of the token that is drawn."""
        sampling = self.sampling
        above = logits - logits.max()  # so that a temperature near 0 gives no infinity but the greedy token
        likely = (above / sampling.temperature).softmax(0)
        if sampling.top_p < 1:
            ordered, ids = likely.sort(descending=True)
            # the token that crosses the mass is in, so the likeliest always is
            ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0
            return int(ids[torch.multinomial(ordered, 1, generator=self._random)])
        return int(torch.multinomial(likely, 1, generator=self._random))


def next_tokens(logits: Float[Tensor, "batch vocab"], samplers: Sequence[Sampler]) -> list[int]:
    """One token for each row. Greedy rows are decided where the logits are; the others' logits come to the CPU."""
    chosen: list[int] = logits.argmax(-1).tolist()
    for row, sampler in enumerate(samplers):
        if not sampler.takes_the_likeliest:
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
    return all_logprobs_of(logits[None], [token], top)[0]


def all_logprobs_of(
    logits: Float[Tensor, "tokens vocab"], tokens: Sequence[int], top: int
) -> tuple[TokenLogprobs, ...]:
    """The log probabilities at several steps, given the token of each."""
    logprobs = logits.float().log_softmax(-1).clamp_min(LEAST_LOGPROB)  # JSON has no infinity
    taken: list[float] = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(top, logprobs.shape[1]))
    likeliest = zip(ids.tolist(), values.tolist(), strict=True)
    return tuple(
        TokenLogprobs(token, logprob, tuple(zip(*best, strict=True)))
        for token, logprob, best in zip(tokens, taken, likeliest, strict=True)
    )
