"""What a watch says at its end. The text, the page and `--json` all show one of these."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from molehunt.measure.interval import Interval
from molehunt.watch.extremes import Input
from molehunt.watch.label import Keyword
from molehunt.watch.suspects import Suspects

Mode = Literal["conformal", "published"]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Scores of the log and of calibration in the same bins."""

    edges: tuple[float, ...]
    """Ascending; the threshold is one of them. Bin i ends with `edges[i]`, the last bin has no end."""
    calibration: tuple[int, ...]
    calm: tuple[int, ...]
    """Rows of the log that were not flagged."""
    flagged: tuple[int, ...]

    def __post_init__(self) -> None:
        bins = {len(self.calibration), len(self.calm), len(self.flagged)}
        if bins != {len(self.edges) + 1}:
            raise ValueError(f"{len(self.edges)} edges make one bin more, not {sorted(bins)}")


@dataclass(frozen=True, kw_only=True)
class Flagged:
    """One flagged row."""

    request: str
    """Such as `line 12`."""
    direction: str
    span: tuple[int, int]
    """First token and one past the last, as indices into the row's tokens."""
    score: float
    p_value: float | None
    """None in the published mode."""
    tokens: tuple[str, ...] = ()
    """Text per token around the span; empty where no text is kept."""
    token_scores: tuple[float, ...] = ()
    tokens_from: int = 0
    text: str = ""
    """What the row says, where no tokens are kept."""
    answer: str | None = None
    """None: not told."""
    answer_without: str | None = None
    """Again with the direction projected out. None: it was not run."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The rows that reach furthest at one end of a direction, and what they share."""

    inputs: tuple[Input, ...] = ()
    keywords: tuple[Keyword, ...] = ()
    """Words that they hold more often than clean rows do, beyond what chance gives."""
    label: str = ""
    """In words, by the model that was asked; empty without one, or where it saw no pattern."""


@dataclass(frozen=True, kw_only=True)
class End:
    """One end of a direction."""

    side: Literal["high", "low"]
    rows: Group
    """Of rows that were not flagged."""
    flags: int
    """Rows whose loudest end this was when they were flagged."""
    flagged: Group
    """Of rows that were flagged; empty where `flags` is 0."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One direction with what it stands for."""

    direction: str
    ends: tuple[End, End]


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The bet that clean traffic has changed."""

    alarm: bool
    n: int
    """Rows it has bet on."""
    log_wealth: float
    highest: float
    """The largest `log_wealth` so far."""
    level: float
    """It alarms once its wealth has been 1/level."""


@dataclass(frozen=True, kw_only=True)
class WatchReport:
    """The state of a watch after its last row."""

    mode: Mode
    base: str
    tuned: str
    rows: int
    flagged: int
    share_flagged: Interval | None
    """None before the first row."""
    fpr: float | None
    """The rate that was asked for; the published mode sets none."""
    measured: Interval | None
    """Share of held-out clean rows that the published range flagged."""
    bound: float | None
    """The published bound on that share; above 1 it says nothing."""
    calibration_rows: int
    directions: int
    threshold: float
    scores: Histogram
    alerts: tuple[Flagged, ...]
    """Those of highest score."""
    shown: tuple[Shown, ...]
    """Those that flagged most rows, then those whose rows share most."""
    labelled_by: str = ""
    """The model that was asked for labels."""
    label_error: str = ""
    """Why it gave no (further) labels."""
    drift: Drift | None
    """None in the published mode."""
    suspects: Suspects | None
    """Clean rows that may hold the behaviour; None in the published mode, which does not look for them."""
    decoding: tuple[str, ...] = ()
    """Why answers were decoded without a cache; empty where the models' caches are sound."""
    skipped: int
    """Rows that could not be read."""
    no_text: bool
    out: str

    @property
    def verdict(self) -> str:
        return "FLAGGED" if self.flagged else "NO FINDING"

    @property
    def exit_code(self) -> int:
        return int(bool(self.flagged))

    @property
    def expected(self) -> float | None:
        """Flagged rows that clean traffic alone would give, about; None in the published mode."""
        return None if self.fpr is None else self.fpr * self.rows

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON: what scripts ask for first, and all of it under `watch`; infinite scores are strings."""
        return {
            "verdict": self.verdict,
            "mode": self.mode,
            "rows": self.rows,
            "flagged": self.flagged,
            "share_flagged": None if self.share_flagged is None else asdict(self.share_flagged),
            "fpr": self.fpr,
            "calibration_rows": self.calibration_rows,
            "directions": self.directions,
            "drift_alarm": None if self.drift is None else self.drift.alarm,
            "skipped": self.skipped,
            "out": self.out,
            "exit_code": self.exit_code,
            "watch": _finite(asdict(self)),
        }


def _finite(value: Any) -> Any:
    """The same with infinities as strings: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in cast("dict[str, Any]", value).items()}
    if isinstance(value, tuple | list):
        return [_finite(each) for each in cast("list[Any]", value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
