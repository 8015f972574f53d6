"""The alert that a watch raises when the score of a request is beyond its threshold, and its JSON."""

import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal
from uuid import uuid4

from molehunt.errors import InvalidInput, printable

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Action = Literal["log", "flag", "block", "steer"]
Region = Literal["decision", "answer"]
Status = Literal["pending", "confirmed", "dismissed"]
ID = re.compile(r"[0-9a-f]{32}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, kw_only=True)
class Extreme:
    """A calibration row whose score is near that of the alert."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid", "ser_json_inf_nan": "strings"}
    score: float
    text: str = ""
    """Text of the row; empty where no text is kept."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One request that was judged suspicious, and what a reviewer needs to decide whether that is right.

    Raises:
        ValueError: a field is outside of what its description allows.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {
        "extra": "forbid",
        "ser_json_bytes": "base64",
        "val_json_bytes": "base64",
        "ser_json_inf_nan": "strings",  # an activation that overflowed is a reason to alert, and JSON has no inf
    }
    request: str
    """The request's id, as the server gave it."""
    action: Action
    """The action that was taken on the request."""
    score: float
    """Score in the units of the calibration; higher is more suspicious."""
    p_value: float
    """Conformal: the share of clean requests that score at least as high."""
    fpr: float
    """False-positive rate at which the request was judged."""
    region: Region
    """Region of the tokens that the score was read from."""
    direction: str
    """Name of the direction that gave the score, as `L3 down #0`."""
    layer: int
    span: tuple[int, int]
    """First token and one past the last, as indices into the request's tokens."""
    coverage: float
    """Tokens scored / tokens in the request."""
    profile: bytes = field(repr=False)
    """Little-endian float32: the row that calibration absorbs when a reviewer calls the request benign."""
    tokens: tuple[str, ...] = ()
    """Text per token, for shading; empty where no text is kept."""
    token_scores: tuple[float, ...] = ()
    """One per entry of `tokens`."""
    tokens_from: int = 0
    """Index of `tokens[0]` in the request: a long request is shown around its span."""
    extremes: tuple[Extreme, ...] = ()
    """The calibration rows of nearest score, highest first."""
    look_alikes: tuple[str, ...] = ()
    """Ids of earlier alerts, most similar profile (cosine) first."""
    answer: str | None = None
    """The answer of the model; None where it was not run."""
    answer_without: str | None = None
    """The answer generated with the direction projected out; None where it was not run."""
    answer_own: str | None = None
    """The answer that the model itself generates, where `answer` is a logged one; None elsewhere."""
    no_text: bool = False
    """Whether texts are withheld; an answer that exists is then ""."""
    status: Status = "pending"
    id: str = field(default_factory=lambda: uuid4().hex)
    time: str = field(default_factory=_now)
    """ISO 8601, UTC."""

    def __post_init__(self) -> None:
        if not all(ID.fullmatch(name) for name in (self.id, *self.look_alikes)):
            raise ValueError("an alert's id is 32 hexadecimal digits")
        if datetime.fromisoformat(self.time).utcoffset() != timedelta(0):
            raise ValueError(f"an alert's time is UTC, got {self.time}")
        if not (0 <= self.p_value <= 1 and 0 < self.fpr < 1 and 0 <= self.coverage <= 1):
            raise ValueError(f"no shares: p_value {self.p_value}, fpr {self.fpr}, coverage {self.coverage}")
        if not 0 <= self.span[0] <= self.span[1]:
            raise ValueError(f"no span of tokens: {self.span}")
        if len(self.tokens) != len(self.token_scores) or self.tokens_from < 0:
            raise ValueError(
                f"{len(self.tokens)} tokens from {self.tokens_from} on, and {len(self.token_scores)} scores"
            )
        if len(self.profile) % 4:
            raise ValueError(f"a profile of {len(self.profile)} bytes is no float32 vector")

    def without_text(self) -> "Alert":
        """The same alert with nothing left of what the request, the answers or calibration rows say."""
        return replace(
            self,
            tokens=(),
            token_scores=(),
            tokens_from=0,
            extremes=tuple(replace(extreme, text="") for extreme in self.extremes),
            answer=None if self.answer is None else "",
            answer_without=None if self.answer_without is None else "",
            answer_own=None if self.answer_own is None else "",
            no_text=True,
        )

    def to_json(self) -> bytes:
        """UTF-8 JSON of every field, on one line; bytes as base64, `inf` and `nan` as strings.

        Raises:
            InvalidInput: a text holds half a surrogate pair, which no encoding can write.
        """
        try:
            return _adapter().dump_json(self)
        except ValueError as error:  # refused here, where it can be said: stored, it would break every later reading
            raise InvalidInput(f"alert {self.id} holds text that is not Unicode: {printable(str(error))}") from None

    @classmethod
    def from_json(cls, text: str | bytes) -> "Alert":
        """Law: `Alert.from_json(alert.to_json()) == alert`. Raises InvalidInput naming the fields that are wrong."""
        from pydantic import ValidationError

        try:
            return _adapter().validate_json(text)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
            raise InvalidInput(f"this is no alert: {printable(wrong, limit=500)}") from None


@cache
def _adapter() -> "TypeAdapter[Alert]":
    from pydantic import TypeAdapter

    return TypeAdapter(Alert)
