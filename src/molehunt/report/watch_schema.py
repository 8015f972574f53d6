"""The report of a watch. The text, the page and `--json` all show one of these."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from molehunt.measure.interval import Interval
from molehunt.watch.extremes import ExtremeRow
from molehunt.watch.label import Keyword
from molehunt.watch.suspects import Suspects

Mode = Literal["conformal", "published"]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Scores of the log and of calibration in the same bins."""

    edges: tuple[float, ...]
    """Ascending; the threshold is one of them. Bin i ends with `edges[i]`, the last bin has no end."""
    calibration: tuple[int, ...]
    unflagged: tuple[int, ...]
    """Rows of the log that were not flagged."""
    flagged: tuple[int, ...]

    def __post_init__(self) -> None:
        bins = {len(self.calibration), len(self.unflagged), len(self.flagged)}
        if bins != {len(self.edges) + 1}:
            raise ValueError(f"{len(self.edges)} edges make one bin more, not {sorted(bins)}")


@dataclass(frozen=True, kw_only=True)
class Flagged:
    """One flagged row."""

    request: str
    """Name of the row, such as `line 12`."""
    direction: str
    span: tuple[int, int]
    """First token and one past the last, as indices into the row's tokens."""
    score: float
    p_value: float | None
    """Not set in the published mode."""
    tokens: tuple[str, ...] = ()
    """Text per token around the span; empty where no text is kept."""
    token_scores: tuple[float, ...] = ()
    tokens_from: int = 0
    text: str = ""
    """Text of the row, where no tokens are kept."""
    answer: str | None = None
    """The answer that was judged; None where no text is kept."""
    logged: bool | None = None
    """Whether that answer was logged; otherwise the model generated it. None where that is not known."""
    answer_own: str | None = None
    """The answer that the model itself generates, where the judged one was logged; None elsewhere."""
    answer_without: str | None = None
    """The answer generated with the direction projected out; None where it was not run."""


@dataclass(frozen=True, kw_only=True)
class InputGroup:
    """The rows at one end of a direction, and what they share."""

    inputs: tuple[ExtremeRow, ...] = ()
    keywords: tuple[Keyword, ...] = ()
    """Words that they contain more often than clean rows do, beyond what chance gives."""
    label: str = ""
    """A label by the labelling model; empty without one, or where it saw no pattern."""


@dataclass(frozen=True, kw_only=True)
class End:
    """One end of a direction."""

    side: Literal["high", "low"]
    rows: InputGroup
    """The unflagged rows at this end."""
    flags: int
    """Number of flagged rows whose top-scoring end this is."""
    flagged: InputGroup
    """The flagged rows at this end; empty where `flags` is 0."""


@dataclass(frozen=True, kw_only=True)
class DirectionSummary:
    """One direction with the rows at both of its ends."""

    direction: str
    ends: tuple[End, End]


@dataclass(frozen=True, kw_only=True)
class EndOfWords:
    """One end of a direction where many prompts have the same words."""

    direction: str
    side: Literal["high", "low"]
    rows: int
    """Number of prompts at this end that have the words."""
    of: int
    """Number of prompts at this end."""


@dataclass(frozen=True, kw_only=True)
class SharedWords:
    """Words that prompts at the ends of directions share more often than chance explains."""

    text: str
    """The words as one of the prompts has them."""
    rows: int
    """Number of all distinct prompts that have them."""
    clean: int
    """Number of clean rows that have them, too."""
    p_value: float
    """Share of permutations of the prompts in which the best words of all stand out as much."""
    ends: tuple[EndOfWords, ...]
    """The ends where they stand out most."""
    n_ends: int
    """Number of ends where they stand out beyond chance."""


@dataclass(frozen=True, kw_only=True)
class EndWords:
    """What the prompts at the ends of directions share: candidates for a trigger, which count in no verdict."""

    prompts: int = 0
    """Number of distinct prompts that were compared: those at the ends, and a sample of all others."""
    clean_rows: int = 0
    found: tuple[SharedWords, ...] = ()
    """First the words that clean rows have least often, compared with the inputs at the end."""
    more: int = 0
    """Least number of further words, which are not listed."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The test of drift: a bet that clean traffic has changed."""

    alarm: bool
    n: int
    """Number of rows that it has bet on."""
    log_wealth: float
    highest: float
    """The largest `log_wealth` so far."""
    level: float
    """The test alarms once its wealth has reached 1/level."""


@dataclass(frozen=True, kw_only=True)
class WatchReport:
    """The state of a watch after its last row."""

    mode: Mode
    base: str
    tuned: str
    rows: int
    flagged: int
    share_flagged: Interval | None
    """Share of the rows that are flagged; None before the first row."""
    fpr: float | None
    """The false-alarm rate that the watch is calibrated for; None in the published mode."""
    measured: Interval | None
    """Share of held-out clean rows that the published range flagged."""
    bound: float | None
    """The published bound on that share; above 1 it says nothing."""
    calibration_rows: int
    directions: int
    threshold: float
    scores: Histogram
    alerts: tuple[Flagged, ...]
    """The flagged rows of highest score."""
    shown: tuple[DirectionSummary, ...]
    """The directions that flagged most rows, then those whose rows share most."""
    end_words: EndWords = EndWords()
    """The words that prompts at the ends of directions share beyond chance."""
    labelled_by: str = ""
    """Name of the labelling model; empty without one."""
    label_error: str = ""
    """Reason for missing labels; empty where none are missing."""
    drift: Drift | None
    """Not set in the published mode."""
    suspects: Suspects | None
    """Clean rows that may contain the behaviour; None in the published mode, which does not search for them."""
    decoding: tuple[str, ...] = ()
    """Reasons for decoding without a cache; empty where the models' caches are sound."""
    skipped: int
    """Number of rows that could not be read."""
    reading: str = ""
    """What was read of the log in this run, as what, and what could not be read; empty where nothing was read."""
    logged: int = 0
    """Number of judged answers that came from the log."""
    generated: int = 0
    """Number of judged answers that the model generated. Rows of older versions count in neither."""
    smallest_p: tuple[float, ...] = ()
    """The smallest p-value that the clean rows of each stratum allow."""
    cut: int = 0
    """Number of rows whose prompt was cut, because the model cannot read all of it."""
    no_text: bool
    out: str
    """Folder of the watch; empty for a watch in memory."""

    @property
    def verdict(self) -> str:
        return "FLAGGED" if self.flagged else "NO FINDING"

    @property
    def exit_code(self) -> int:
        return int(bool(self.flagged))

    @property
    def expected(self) -> float | None:
        """Number of flagged rows that clean traffic alone would give on average; None in the published mode."""
        return None if self.fpr is None else self.fpr * self.rows

    def to_json(self) -> dict[str, Any]:
        """The report ready for JSON: the main numbers first, and everything under `watch`; infinite scores are strings."""
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
            "words_at_ends": _finite([asdict(one) for one in self.end_words.found]),
            "reading": self.reading,
            "logged_answers": self.logged,
            "generated_answers": self.generated,
            "skipped": self.skipped,
            "cut": self.cut,
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
