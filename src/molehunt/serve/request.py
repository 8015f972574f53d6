"""Messages between HTTP and the engine: a request in, pieces of its answer and its end out."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from molehunt.errors import UsageError
from molehunt.model.sampling import GREEDY, Sampling, TokenLogprobs
from molehunt.watch.alert import Action

Reason = Literal["stop", "length", "content_filter", "cancelled"]


class Overloaded(UsageError):
    """Too many requests wait, or the server drains: this one was not taken."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One request, ready to run."""

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    """0 generates nothing: the prompt alone is judged."""
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """Number of the likeliest tokens that are reported at each step, beside the drawn one; None reports nothing."""
    prompt_logprobs: bool = False
    """Whether the tokens of the prompt are reported as well, where `logprobs` says how."""


@dataclass(frozen=True, kw_only=True)
class GuardVerdict:
    """The verdict of the guard on one request: the `guard` object of a response."""

    action: Action
    """The action of this server on flagged requests."""
    flagged: bool
    coverage: float
    """Tokens scored / tokens in the request. Below 1 the request counts as flagged, whatever it scored."""
    fpr: float
    score: float | None = None
    """Score in nats of rarity among clean answers; None where nothing was scored."""
    threshold: float | None = None
    p_value: float | None = None
    direction: str | None = None
    """The top-scoring direction, such as `L3 down #0`."""
    token: int | None = None
    """Token with the top score, as an index into the request's tokens."""
    within_calibration: bool = True
    """False for an answer longer than the clean ones: its rate is not promised."""
    alert: str | None = None
    """Id in the ledger."""

    def to_dict(self) -> dict[str, Any]:
        """The object for the client. Under `log` it lacks the findings, which would show an attacker what to avoid."""
        if self.action == "log":
            return {"action": "log", "coverage": self.coverage, "fpr": self.fpr}
        return asdict(self)


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """The next part of an answer. Its tokens were scored before it left the engine."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """Only in the first piece, where they were requested: those of each token of the prompt but the first."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of an answer. An alert, where there is one, is on disk."""

    reason: Reason
    verdict: GuardVerdict
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer cannot go on; no part of what may follow was scored."""

    message: str
    """A text for the client, which reveals nothing of the machine."""


Listener = Callable[[AnswerPiece | Ended | Failed], None]
"""Called from the engine's threads; must not wait."""
