"""Build the report of a watch from its state and verdicts: scores in bins, alerts, and what directions stand for."""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import nlargest
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from molehunt.errors import InvalidInput, printable
from molehunt.measure.interval import proportion
from molehunt.report.watch_schema import (
    DirectionSummary,
    Drift,
    End,
    Flagged,
    Histogram,
    InputGroup,
    WatchReport,
)
from molehunt.report.watch_words import end_words
from molehunt.traffic.stream import Conversation
from molehunt.watch.alert import Alert
from molehunt.watch.bank import Bank
from molehunt.watch.extremes import ExtremeRow, Extremes, Inputs, RowText, whole_prompt
from molehunt.watch.label import CleanWords, Keyword, usual_words, words
from molehunt.watch.label_endpoint import LabelEndpoint, LabelUnavailable
from molehunt.watch.published import PublishedState, role_names
from molehunt.watch.state import WatchState

ALERTS = 20
"""Greatest number of flagged rows that are shown."""
ALERTS_AMONG = 500
"""Number of the newest alerts that the shown ones are chosen from."""
SHOWN = 12
"""Greatest number of directions that are reported."""
BELOW, BEYOND = 32, 14
"""Number of bins up to the threshold, and of as wide ones beyond it; one more bin holds the rest."""
NEVER = 1.0
"""Width of a bin where all calibration scores are the same."""
Side = Literal["high", "low"]
SIDES: tuple[Side, Side] = ("high", "low")


@dataclass(eq=False, kw_only=True)
class VerdictCounts:
    """The verdicts of a log, counted in one pass."""

    edges: tuple[float, ...]
    unflagged: list[int] = field(default_factory=list[int])
    flagged: list[int] = field(default_factory=list[int])
    flags: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    """Number of flagged rows by top-scoring direction and side."""
    highest: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    """The flagged rows of highest score, at most `ALERTS`."""
    cut: int = 0
    """Number of rows whose prompt was cut."""
    logged: int = 0
    """Number of rows whose answer was logged."""
    generated: int = 0
    """Number of rows whose answer the model generated."""

    @classmethod
    def empty(cls, edges: tuple[float, ...]) -> "VerdictCounts":
        """Counts of no row in bins with these ends."""
        return cls(edges=edges, unflagged=[0] * (len(edges) + 1), flagged=[0] * (len(edges) + 1))

    @classmethod
    def read(cls, path: Path, written: int, edges: tuple[float, ...]) -> "VerdictCounts":
        """Count the first `written` bytes of the file at `path`. Raises InvalidInput for lines that no watch wrote."""
        found = cls.empty(edges)
        for number, line in enumerate(verdict_lines(path, written), 1):
            try:
                found.add(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise InvalidInput(
                    f"{printable(path.name)} line {number} is none that a watch wrote: {printable(repr(line[:60]))}.\n"
                    "Remove the files of the watch to start anew."
                ) from None
        return found

    def add(self, verdict: Mapping[str, Any]) -> None:
        """Count one verdict. Raises ValueError, KeyError or TypeError for anything else."""
        flagged, score = bool(verdict["flagged"]), float(verdict["score"])
        self.cut += bool(verdict.get("left_out"))
        self.logged += verdict.get("logged") is True
        self.generated += verdict.get("logged") is False
        (self.flagged if flagged else self.unflagged)[bisect_left(self.edges, score)] += 1
        if flagged:
            self.flags[str(verdict["direction"]), str(verdict["side"])] += 1
            self.highest = nlargest(ALERTS, [*self.highest, verdict], key=lambda one: (one["score"], -one["line"]))

    def histogram(self, calibration: Sequence[float]) -> Histogram:
        """The counts beside the scores of calibration rows."""
        counted = [0] * (len(self.edges) + 1)
        for score in calibration:
            counted[bisect_left(self.edges, score)] += 1
        return Histogram(
            edges=self.edges, calibration=tuple(counted), unflagged=tuple(self.unflagged), flagged=tuple(self.flagged)
        )


def verdict_lines(path: Path, written: int) -> Iterator[bytes]:
    """The lines in the first `written` bytes of a file of verdicts. Raises InvalidInput for a file that was cut."""
    if not written:
        return
    with path.open("rb") as file:
        while file.tell() < written:
            if not (line := file.readline()):
                raise InvalidInput(
                    f"{printable(path.name)} is cut off: it had {written} bytes.\nRemove the files of the watch to start anew."
                )
            yield line


def conformal_edges(state: WatchState) -> tuple[float, ...]:
    """Ends of the bins in which the scores of a watch with a rate are counted."""
    return edges_of(state.monitor.calibration, state.monitor.threshold)


def published_edges(state: PublishedState) -> tuple[float, ...]:
    """Ends of the bins in which the scores of the published mode are counted."""
    return edges_of(state.held_out, 0.0)


def edges_of(calibration: Float[Tensor, " n"], threshold: float) -> tuple[float, ...]:
    """Ends of bins of one width, from the lowest calibration score on, the threshold among them."""
    finite = calibration[calibration.isfinite()].double()
    low = min(float(finite.min()), threshold) if len(finite) else threshold
    width = (threshold - low) / BELOW or NEVER
    return (
        *(threshold - i * width for i in range(BELOW, 0, -1)),
        threshold,
        *(threshold + i * width for i in range(1, BEYOND + 1)),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Labels:
    """Labels for groups of inputs: the words that stand out, and a labelling model where there is one."""

    clean: CleanWords
    prompts: tuple[str, ...]
    """The prompts of the clean rows."""
    with_answers: bool
    """Whether clean rows were logged with their answers, so that words of answers can be compared, too."""
    endpoint: LabelEndpoint | None = None

    @classmethod
    def of(cls, clean: Sequence[Conversation], endpoint: LabelEndpoint | None, *, seed: int) -> "Labels":
        """Labels by comparison with these clean rows."""
        with_answers = bool(clean) and all(row.response for row in clean)
        texts = (RowText.of(row.turns, (row.response or "") if with_answers else "") for row in clean)
        return cls(
            clean=CleanWords.of(map(_joined, texts), seed=seed),
            prompts=tuple(whole_prompt(row.turns) for row in clean),
            with_answers=with_answers,
            endpoint=endpoint,
        )

    def keywords(self, inputs: Sequence[ExtremeRow], traffic: Mapping[int, RowText]) -> tuple[Keyword, ...]:
        """The words that stand out among inputs; none where an input has no text.

        Args:
            inputs: the rows of one group.
            traffic: texts of unflagged rows by their number. A word that most of those outside the group have, such as
                one of a system prompt that every row has, says nothing about the group.
        """
        if not all(one.prompt for one in inputs):
            return ()
        mine = {one.row for one in inputs}
        others = [self._words(text) for row, text in traffic.items() if row not in mine]
        common = usual_words(others)
        return self.clean.keywords([self._words(RowText(one.prompt, one.answer)) - common for one in inputs])

    def _words(self, text: RowText) -> frozenset[str]:
        return words(_joined(text if self.with_answers else RowText(text.prompt, "")))


def directions(
    inputs: Inputs, names: Sequence[str], flags: Mapping[tuple[str, str], int], labels: Labels
) -> tuple[DirectionSummary, ...]:
    """The reported directions: first those that flagged most rows, then those whose rows share most."""

    def group(extremes: Extremes, column: int, side: Side) -> InputGroup:
        found = extremes.end(column, high=side == "high")
        return InputGroup(inputs=found, keywords=labels.keywords(found, inputs.unflagged.texts))

    def end(column: int, side: Side) -> End:
        n = flags.get((names[column], side), 0)
        return End(
            side=side,
            rows=group(inputs.unflagged, column, side),
            flags=n,
            flagged=group(inputs.quarantined, column, side) if n else InputGroup(),
        )

    def worth(one: DirectionSummary) -> tuple[int, float]:
        shared = [k.at_least for each in one.ends for k in (*each.rows.keywords, *each.flagged.keywords)]
        return -sum(each.flags for each in one.ends), -max(shared, default=0.0)

    found = [
        DirectionSummary(direction=name, ends=(end(column, "high"), end(column, "low")))
        for column, name in enumerate(names)
    ]
    return tuple(sorted(found, key=worth)[:SHOWN])  # sorted is stable: else the order of the bank


def labelled(shown: Sequence[DirectionSummary], endpoint: LabelEndpoint) -> tuple[tuple[DirectionSummary, ...], str]:
    """The same with a label for every group that has text, and why there are no more of them."""
    failed = ""

    def with_label(group: InputGroup) -> InputGroup:
        nonlocal failed
        if failed or not group.inputs or not all(one.prompt for one in group.inputs):
            return group
        try:
            return replace(group, label=endpoint.label([_joined(RowText(i.prompt, i.answer)) for i in group.inputs]))
        except LabelUnavailable as error:
            failed = str(error)
            return group

    def both(end: End) -> End:
        return replace(end, flagged=with_label(end.flagged), rows=with_label(end.rows))

    found = tuple(replace(one, ends=(both(one.ends[0]), both(one.ends[1]))) for one in shown)
    return found, failed


def conformal_report(
    state: WatchState,
    bank: Bank,
    inputs: Inputs,
    alerts: Sequence[Alert],
    labels: Labels,
    verdicts: VerdictCounts,
    *,
    fpr: float,
    header: Mapping[str, Any],
) -> WatchReport:
    """The report of a watch whose rate is set.

    Args:
        alerts: alerts that the shown ones are chosen from.
        verdicts: counts of the judged rows, in the bins of `conformal_edges`.
        header: the fields that the caller knows: base, tuned, skipped, reading, decoding, out.
    """
    calibration = state.monitor.calibration
    drift = state.drift
    return _report(
        inputs,
        bank.names,
        verdicts,
        labels,
        mode="conformal",
        rows=state.seen,
        flagged=state.flagged,
        fpr=fpr,
        measured=None,
        bound=None,
        calibration_rows=len(calibration),
        directions=bank.written,
        threshold=state.monitor.threshold,
        scores=verdicts.histogram(calibration.tolist()),
        alerts=tuple(
            _of_alert(one, no_text=inputs.no_text) for one in nlargest(ALERTS, alerts, key=lambda one: one.score)
        ),
        drift=Drift(
            alarm=drift.alarm, n=drift.n, log_wealth=drift.log_wealth, highest=drift.highest, level=drift.level
        ),
        suspects=state.suspects,
        smallest_p=tuple(sorted({1 / (len(one.calibration) + 1) for one in state.monitor.by_stratum})),
        **header,
    )


def published_report(
    state: PublishedState,
    bank: Bank,
    inputs: Inputs,
    labels: Labels,
    verdicts: VerdictCounts,
    *,
    header: Mapping[str, Any],
) -> WatchReport:
    """The report of a watch whose range takes in every row. Arguments as `conformal_report`."""
    return _report(
        inputs,
        role_names(bank),
        verdicts,
        labels,
        mode="published",
        rows=state.seen,
        flagged=state.flagged,
        fpr=None,
        measured=proportion(int((state.held_out > 0).sum()), len(state.held_out)),
        bound=state.bound,
        calibration_rows=state.calibration_rows,
        directions=bank.written,
        threshold=0.0,
        scores=verdicts.histogram(state.held_out.tolist()),
        alerts=tuple(_of_verdict(one, inputs.quarantined.texts) for one in verdicts.highest),
        drift=None,
        suspects=None,
        **header,
    )


def _report(
    inputs: Inputs,
    names: Sequence[str],
    verdicts: VerdictCounts,
    labels: Labels,
    *,
    rows: int,
    flagged: int,
    **fields: Any,
) -> WatchReport:
    shown, failed = directions(inputs, names, verdicts.flags, labels), ""
    if labels.endpoint is not None:
        shown, failed = labelled(shown, labels.endpoint)
    return WatchReport(
        rows=rows,
        flagged=flagged,
        share_flagged=proportion(flagged, rows) if rows else None,
        shown=shown,
        end_words=end_words(inputs, names, labels.prompts),
        labelled_by="" if labels.endpoint is None else labels.endpoint.model,
        label_error=failed,
        no_text=inputs.no_text,
        cut=verdicts.cut,
        logged=verdicts.logged,
        generated=verdicts.generated,
        **fields,
    )


def _of_alert(alert: Alert, *, no_text: bool) -> Flagged:
    one = alert.without_text() if no_text else alert
    return Flagged(
        request=one.request,
        direction=one.direction,
        span=one.span,
        score=one.score,
        p_value=one.p_value,
        tokens=one.tokens,
        token_scores=one.token_scores,
        tokens_from=one.tokens_from,
        answer=None if one.no_text else one.answer,
        answer_without=None if one.no_text else one.answer_without,
        logged=one.answer_own is not None,
        answer_own=None if one.no_text else one.answer_own,
    )


def _of_verdict(verdict: Mapping[str, Any], texts: Mapping[int, RowText]) -> Flagged:
    text = texts.get(verdict["line"])
    return Flagged(
        request=f"line {verdict['line']}",
        direction=f"{verdict['direction']}, {verdict['side']}",
        span=(verdict["token"], verdict["token"] + 1),
        score=verdict["score"],
        p_value=None,
        text="" if text is None else text.prompt,
        answer=None if text is None else text.answer,
        logged=verdict.get("logged"),
    )


def _joined(text: RowText) -> str:
    return f"{text.prompt}\n{text.answer}" if text.answer else text.prompt
