"""The options of a watch, and which of them belong together."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from molehunt.errors import UsageError, printable
from molehunt.measure.threshold import check_rate
from molehunt.run.local import WorkShard
from molehunt.traffic.opened import is_readable
from molehunt.traffic.stream import WHOLE
from molehunt.watch.label_endpoint import LabelEndpoint
from molehunt.workflows.inputs import Texts

Mode = Literal["conformal", "published"]
KEY = "OPENAI_API_KEY"
"""Environment variable with the key of the labelling model."""


@dataclass(frozen=True, eq=False, kw_only=True)
class WatchOptions:
    """Options of a watch.

    Raises:
        UsageError: options that do not fit together.
    """

    traffic: Texts | None = None
    """Log to watch; None calibrates alone."""
    clean: Texts | None = None
    """Clean rows to calibrate on; None takes bundled benign prompts."""
    clean_rows: int = 2000
    """Greatest number of clean rows that are read."""
    mode: Mode = "conformal"
    """`conformal` keeps the false-alarm rate `fpr`; `published` is WeightWatch's range of cosines, which sets no rate."""
    fpr: float = 0.01
    """Share of clean answers that may be flagged."""
    trust_clean: bool = False
    """Whether suspicious clean rows are calibrated on, too."""
    percentile: float | None = None
    """Share of the rows that `published` leaves out at each end of a range, by default 0."""
    slack: float | None = None
    """Cosine by which a range of `published` may be left, by default 0.01."""
    max_new_tokens: int = 32
    """Number of tokens that are generated for a row whose answer was not logged."""
    labels: LabelEndpoint | None = None
    """Model that labels directions; None takes the words that stand out."""
    skip_bad: bool = False
    """Whether rows that cannot be read are skipped and counted."""
    no_text: bool = False
    """Whether no text of any row is kept."""
    shard: WorkShard = WHOLE
    """The share of the rows that is read."""
    adapter: bool | None = None
    """Whether the adapter is applied, in a folder with full weights and an adapter."""
    device: str = "cpu"
    """Device that the models run on."""
    out: Path | None = None
    """Folder for state, verdicts, alerts and page, in which a watch resumes; None keeps everything in memory."""
    seed: int = 0
    """Seed of everything random."""
    attacks: Texts | None = None
    """Rows that a simulation inserts into the traffic, which is taken as benign."""
    repeats: int = 100
    """Number of times that a simulation inserts each attack."""

    def __post_init__(self) -> None:
        if isinstance(self.traffic, str | Path) and not is_readable(Path(self.traffic)):
            raise UsageError(
                f"{printable(str(self.traffic))} is not a file; traffic (--traffic) takes a JSONL, JSON, CSV or parquet log, "
                "or - for standard input."
            )
        if self.mode == "conformal" and (self.percentile, self.slack) != (None, None):
            raise UsageError(
                "percentile (--percentile) and slack (--slack) belong to the mode published; the other mode sets its rate "
                "by fpr (--fpr)."
            )
        if self.mode == "published" and self.trust_clean:
            raise UsageError(
                "trust_clean (--trust-clean) belongs to the mode with a rate: the published one takes every row in."
            )
        if self.mode == "published" and self.attacks is not None:
            raise UsageError(
                "attacks (--attacks) shows the published range beside the other mode: leave mode (--mode) out."
            )
        if self.labels is not None and self.no_text:
            raise UsageError(
                "no_text (--no-text) and labels (--label-with) say opposite things: labels are made of rows' text."
            )
        if self.mode == "conformal":
            check_rate(self.fpr)


def label_endpoint(url: str | None, model: str | None) -> LabelEndpoint | None:
    """The labelling model behind an OpenAI-compatible URL, with the key in $OPENAI_API_KEY; None without a URL.

    Raises:
        UsageError: one of URL and name is missing, or the URL is not valid.
    """
    if url is None and model is None:
        return None
    if url is None or model is None:
        raise UsageError("--label-with URL and --label-model NAME go together.")
    return LabelEndpoint(url=url, model=model, key=os.environ.get(KEY) or None)
