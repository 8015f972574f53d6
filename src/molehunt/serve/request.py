"""What passes between the wire and the engine: a request in, pieces of its answer and its end out."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from molehunt.errors import UsageError
from molehunt.serve.sampling import GREEDY, Sampling, TokenLogprobs
from molehunt.watch.alert import Action

Reason = Literal["stop", "length", "content_filter", "cancelled"]


class Overloaded(UsageError):
    """Too many requests wait, or the server drains: this one was not taken."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request, ready to run."""

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """How many of the likeliest tokens to tell at each step, beside the one that was drawn; None tells nothing."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the guard says of one request: the `guard` object of a response."""

    action: Action
    """What flagged requests have done to them here."""
    flagged: bool
    coverage: float
    """Tokens scored / tokens in the request. Below 1 the request counts as flagged, whatever it scored."""
    fpr: float
    score: float | None = None
    """In nats of rarity among clean answers; None where nothing was scored."""
    threshold: float | None = None
    p_value: float | None = None
    direction: str | None = None
    """The direction that speaks loudest, such as `L3 down #0`."""
    token: int | None = None
    """Where it does, as an index into the request's tokens."""
    within_calibration: bool = True
    """False for an answer longer than those that clean traffic showed: its rate is not promised."""
    alert: str | None = None
    """Id in the ledger."""

    def told(self) -> dict[str, Any]:
        """For the client. Under `log` it is not told what was found: that would show an attacker what to avoid."""
        if self.action == "log":
            return {"action": "log", "coverage": self.coverage, "fpr": self.fpr}
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of an answer. Its tokens were scored before it left the engine."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of an answer. An alert, where there is one, is on disk."""

    reason: Reason
    verdict: Verdict
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer cannot go on; no part of what may follow was scored."""

    message: str
    """For the client; says nothing of the machine."""


Listener = Callable[[Piece | Ended | Failed], None]
"""Called from the engine's threads; must not wait."""
