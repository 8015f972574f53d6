"""Both modes of a watch: a monitor with a false-alarm rate, and the published range of cosines.

Each mode is the state of a watch after its last row. It judges rows in its folder, or in memory on a copy of itself, and
builds the report of what it has judged.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from molehunt.errors import UsageError, printable
from molehunt.report.watch_build import (
    ALERTS_AMONG,
    Labels,
    VerdictCounts,
    conformal_edges,
    conformal_report,
    published_edges,
    published_report,
)
from molehunt.report.watch_schema import WatchReport
from molehunt.run.progress import Track, silent
from molehunt.traffic.left_out import RowCount
from molehunt.traffic.stream import Conversation
from molehunt.watch import published as range_watch
from molehunt.watch.alert import Alert
from molehunt.watch.alert_store import AlertList
from molehunt.watch.extremes import Inputs
from molehunt.watch.judge import judge_answers
from molehunt.watch.ledger import Ledger
from molehunt.watch.log import RowJudge, chunks, row_judge, watch_log
from molehunt.watch.ranges import SLACK
from molehunt.watch.row_verdict import RowVerdict
from molehunt.watch.state import WatchState
from molehunt.workflows.watch_options import WatchOptions
from molehunt.workflows.watch_target import STATE, WatchTarget, calibrated_state

ALERTS = "alerts.sqlite"
VERDICTS = "verdicts.jsonl"


@dataclass(frozen=True, eq=False, kw_only=True)
class ConformalWatch:
    """A watch at a chosen false-alarm rate."""

    state_file: ClassVar[str] = STATE
    target: WatchTarget
    options: WatchOptions
    state: WatchState
    inputs: Inputs
    alerts: tuple[Alert, ...] = ()
    """Alerts of a watch in memory, oldest first; a folder has them in its ledger."""

    @classmethod
    def open(cls, target: WatchTarget, options: WatchOptions, track: Track = silent) -> "ConformalWatch":
        """Calibrate, or go on with the state in the folder. Raises as `calibrated_state`."""
        refuse_other_mode(options.out, range_watch.FILE, "published")
        state = calibrated_state(
            target,
            fpr=options.fpr,
            max_new_tokens=options.max_new_tokens,
            out=options.out,
            seed=options.seed,
            trust_clean=options.trust_clean,
            no_text=options.no_text,
            track=track,
        )
        inputs = saved_inputs(options, state, len(target.bank.names))
        return cls(target=target, options=options, state=state, inputs=inputs)

    @property
    def threshold(self) -> float:
        """Score above which an answer is flagged."""
        return self.state.monitor.threshold

    def judge_in_folder(self, rows: Iterable[Conversation], into: Path, track: Track) -> "ConformalWatch":
        """Judge rows and record everything in `into`."""
        with self._ledger(into) as ledger:
            watch_log(
                self.target.pair,
                self.target.bank,
                self.state,
                self.inputs,
                rows,
                fpr=self.options.fpr,
                max_new_tokens=self.options.max_new_tokens,
                into=into,
                ledger=ledger,
                track=track,
            )
        return self

    def judge_in_memory(self, rows: Iterable[Conversation], track: Track) -> tuple["ConformalWatch", list[RowVerdict]]:
        """The watch after these rows, and their verdicts; this one stays as it is."""
        alerts = AlertList(self.alerts, no_text=self.options.no_text)
        copy = replace(self, state=self.state.copy(), inputs=self.inputs.copy())
        judge = row_judge(
            self.target.pair,
            self.target.bank,
            copy.state,
            copy.inputs,
            fpr=self.options.fpr,
            max_new_tokens=self.options.max_new_tokens,
            alerts=alerts,
            track=track,
        )
        verdicts = _judged(rows, copy.state, judge)
        return replace(copy, alerts=alerts.alerts), verdicts

    def score(self, row: Conversation, track: Track) -> tuple[RowVerdict, tuple[int, ...]]:
        """The verdict on one row, which is not recorded, and the token ids of its answer."""
        (one,) = judge_answers(
            self.target.pair,
            self.target.bank,
            self.state.monitor,
            [row],
            max_new_tokens=self.options.max_new_tokens,
            keep_empty=True,
            track=track,
        )
        return one.verdict(self.target.bank, row, fpr=self.options.fpr), one.answer

    def report(self, verdicts: Sequence[RowVerdict], read: RowCount) -> WatchReport:
        """The report of all rows judged so far. `verdicts` are those of a watch in memory, `read` what this run read."""
        alerts = list(reversed(self.alerts))[:ALERTS_AMONG]
        if self.options.out is not None:
            with self._ledger(self.options.out) as ledger:
                alerts = ledger.recent(ALERTS_AMONG)
        return conformal_report(
            self.state,
            self.target.bank,
            self.inputs,
            alerts,
            labels_of(self.target, self.options),
            counted(self.options, self.state.written, verdicts, conformal_edges(self.state)),
            fpr=self.options.fpr,
            header=header_of(self.target, self.options, read),
        )

    def save_alerts(self, folder: Path) -> None:
        """Write the alerts of a watch in memory into the ledger of a folder."""
        with self._ledger(folder) as ledger:
            for alert in self.alerts:
                if ledger.get(alert.id) is None:
                    ledger.record(alert)

    def _ledger(self, folder: Path) -> Ledger:
        return Ledger(f"sqlite:///{(folder / ALERTS).absolute()}", no_text=self.options.no_text)


@dataclass(frozen=True, eq=False, kw_only=True)
class PublishedWatch:
    """A watch as published, arXiv 2508.00161: no rate is set, and the range takes in every row."""

    state_file: ClassVar[str] = range_watch.FILE
    target: WatchTarget
    options: WatchOptions
    state: range_watch.PublishedState
    inputs: Inputs

    @classmethod
    def open(cls, target: WatchTarget, options: WatchOptions, track: Track = silent) -> "PublishedWatch":
        """Calibrate, or go on with the state in the folder. Raises as `calibrated_range`."""
        refuse_other_mode(options.out, STATE, "conformal")
        slack = SLACK if options.slack is None else options.slack
        percentile = options.percentile or 0.0
        rateless = {name: value for name, value in target.identity.items() if name != "false-alarm rate"}
        identity = {**rateless, "slack": f"{slack:g}", "percentile": f"{percentile:g}"}
        saved = None if options.out is None else options.out / range_watch.FILE
        if saved is not None and saved.exists():
            state = range_watch.PublishedState.load(saved, identity)
        else:
            if saved is not None:
                saved.parent.mkdir(parents=True, exist_ok=True)
            state = range_watch.calibrated_range(
                target.pair,
                target.bank,
                target.clean,
                identity=identity,
                max_new_tokens=options.max_new_tokens,
                slack=slack,
                percentile=percentile,
                seed=options.seed,
                track=track,
            )
            if saved is not None:
                state.save(saved)
        inputs = saved_inputs(options, state, len(range_watch.role_names(target.bank)))
        return cls(target=target, options=options, state=state, inputs=inputs)

    @property
    def threshold(self) -> float:
        """Cosine beyond range and slack above which a row is flagged."""
        return 0.0

    def judge_in_folder(self, rows: Iterable[Conversation], into: Path, track: Track) -> "PublishedWatch":
        """Judge rows and record everything in `into`."""
        range_watch.watch_published(
            self.target.pair,
            self.target.bank,
            self.state,
            self.inputs,
            rows,
            max_new_tokens=self.options.max_new_tokens,
            into=into,
            track=track,
        )
        return self

    def judge_in_memory(self, rows: Iterable[Conversation], track: Track) -> tuple["PublishedWatch", list[RowVerdict]]:
        """The watch after these rows, and their verdicts; this one stays as it is."""
        copy = replace(self, state=self.state.copy(), inputs=self.inputs.copy())
        judge = range_watch.published_judge(
            self.target.pair,
            self.target.bank,
            copy.state,
            copy.inputs,
            max_new_tokens=self.options.max_new_tokens,
            track=track,
        )
        return copy, _judged(rows, copy.state, judge)

    def score(self, row: Conversation, track: Track) -> tuple[RowVerdict, tuple[int, ...]]:
        """The verdict on one row, which the range does not take in, and the token ids of its answer."""
        (one,) = range_watch.read_roles(
            self.target.pair,
            self.target.bank,
            [row],
            max_new_tokens=self.options.max_new_tokens,
            keep_empty=True,
            track=track,
            what="judging",
        )
        names = range_watch.role_names(self.target.bank)
        return range_watch.range_verdict(names, row, one, self.state.beyond(one)), one.answer

    def report(self, verdicts: Sequence[RowVerdict], read: RowCount) -> WatchReport:
        """The report of all rows judged so far. `verdicts` are those of a watch in memory, `read` what this run read."""
        return published_report(
            self.state,
            self.target.bank,
            self.inputs,
            labels_of(self.target, self.options),
            counted(self.options, self.state.written, verdicts, published_edges(self.state)),
            header=header_of(self.target, self.options, read),
        )

    def save_alerts(self, folder: Path) -> None:
        """Do nothing: this mode quarantines no row."""


AnyWatch = ConformalWatch | PublishedWatch


def _judged(
    rows: Iterable[Conversation], state: WatchState | range_watch.PublishedState, judge: RowJudge
) -> list[RowVerdict]:
    verdicts: list[RowVerdict] = []
    for chunk in chunks(rows):
        verdicts += judge(chunk)
        state.place = chunk[-1].end
    return verdicts


def saved_inputs(options: WatchOptions, state: WatchState | range_watch.PublishedState, columns: int) -> Inputs:
    """The inputs that the folder remembers; none before the first row, when a file there is of another watch."""
    if options.out is None or not state.seen:
        return Inputs.empty(columns, no_text=options.no_text)
    return Inputs.load(options.out, state.identity, columns, no_text=options.no_text)


def refuse_other_mode(out: Path | None, file: str, mode: str) -> None:
    """Raises UsageError for a folder with the state of the other mode, whose verdicts would be overwritten."""
    if out is not None and (out / file).exists():
        raise UsageError(
            f"{printable(str(out))} holds a watch of the {mode} mode, whose verdicts would be written over.\n"
            "Give another folder (out, --out)."
        )


def labels_of(target: WatchTarget, options: WatchOptions) -> Labels:
    """Labels of directions by words that clean rows seldom contain, and by the model of the options."""
    return Labels.of(target.clean, options.labels, seed=options.seed)


def counted(
    options: WatchOptions, written: int, verdicts: Sequence[RowVerdict], edges: tuple[float, ...]
) -> VerdictCounts:
    """Counts of the verdicts in the folder, or of those in memory."""
    if options.out is not None:
        return VerdictCounts.read(options.out / VERDICTS, written, edges)
    found = VerdictCounts.empty(edges)
    for verdict in verdicts:
        found.add(verdict.to_dict())
    return found


def header_of(target: WatchTarget, options: WatchOptions, read: RowCount) -> dict[str, Any]:
    """The fields of a report that the state does not know."""
    return {
        "base": target.names[0],
        "tuned": target.names[1],
        "skipped": read.bad.count,
        "reading": read.sentence("judged", reasons=not options.no_text),
        "decoding": target.pair.decoding_notes(),
        "out": "" if options.out is None else str(options.out),
    }
