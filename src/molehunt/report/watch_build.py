"""From what a watch left in its folder to what it says: scores in bins, alerts, and what directions stand for."""

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
from molehunt.report.watch_schema import Drift, End, Flagged, Group, Histogram, Shown, WatchReport
from molehunt.traffic.stream import Conversation
from molehunt.watch.alert import Alert
from molehunt.watch.bank import Bank
from molehunt.watch.extremes import Extremes, Input, Inputs, Text
from molehunt.watch.label import CleanWords, Keyword, words
from molehunt.watch.label_endpoint import LabelEndpoint, LabelUnavailable
from molehunt.watch.published import PublishedState, role_names
from molehunt.watch.state import WatchState

ALERTS = 20
ALERTS_AMONG = 500
"""Newest alerts that those are chosen from."""
SHOWN = 12
"""Directions that are told of."""
BELOW, BEYOND = 32, 14
"""Bins up to the threshold, and as wide ones beyond it; what lies further is in one."""
NEVER = 1.0
"""Width of a bin where all calibration scores are the same."""
Side = Literal["high", "low"]
SIDES: tuple[Side, Side] = ("high", "low")


@dataclass(eq=False, kw_only=True)
class Verdicts:
    """What `verdicts.jsonl` holds, counted in one pass."""

    edges: tuple[float, ...]
    calm: list[int] = field(default_factory=list[int])
    flagged: list[int] = field(default_factory=list[int])
    flags: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    """Flagged rows by loudest direction and side."""
    highest: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    """The flagged rows of highest score, at most `ALERTS`."""

    @classmethod
    def read(cls, path: Path, written: int, edges: tuple[float, ...]) -> "Verdicts":
        """The first `written` bytes of the file at `path`. Raises InvalidInput for lines that no watch wrote."""
        found = cls(edges=edges, calm=[0] * (len(edges) + 1), flagged=[0] * (len(edges) + 1))
        for number, line in enumerate(_lines(path, written), 1):
            try:
                told = json.loads(line)
                flagged, score = bool(told["flagged"]), float(told["score"])
                (found.flagged if flagged else found.calm)[bisect_left(edges, score)] += 1
                if flagged:
                    found.flags[str(told["direction"]), str(told["side"])] += 1
                    found.highest = nlargest(
                        ALERTS, [*found.highest, told], key=lambda one: (one["score"], -one["line"])
                    )
            except (ValueError, KeyError, TypeError):
                raise InvalidInput(
                    f"{printable(path.name)} line {number} is none that a watch wrote: {printable(repr(line[:60]))}.\n"
                    "Remove the files of the watch to begin anew."
                ) from None
        return found

    def histogram(self, calibration: Sequence[float]) -> Histogram:
        """Beside the scores of calibration rows."""
        counted = [0] * (len(self.edges) + 1)
        for score in calibration:
            counted[bisect_left(self.edges, score)] += 1
        return Histogram(
            edges=self.edges, calibration=tuple(counted), calm=tuple(self.calm), flagged=tuple(self.flagged)
        )


def _lines(path: Path, written: int) -> Iterator[bytes]:
    if not written:
        return
    with path.open("rb") as file:
        while file.tell() < written:
            if not (line := file.readline()):
                raise InvalidInput(
                    f"{printable(path.name)} is cut off: it had {written} bytes.\nRemove the files of the watch to begin anew."
                )
            yield line


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
    """What is needed to say what inputs share."""

    clean: CleanWords
    with_answers: bool
    """Clean rows were logged with their answers, so that words of answers can be compared, too."""
    endpoint: LabelEndpoint | None = None

    @classmethod
    def of(cls, clean: Sequence[Conversation], endpoint: LabelEndpoint | None, *, seed: int) -> "Labels":
        """Held against these clean rows."""
        with_answers = bool(clean) and all(row.response for row in clean)
        texts = (Text.of(row.turns, (row.response or "") if with_answers else "") for row in clean)
        return cls(clean=CleanWords.of(map(_joined, texts), seed=seed), with_answers=with_answers, endpoint=endpoint)

    def keywords(self, inputs: Sequence[Input]) -> tuple[Keyword, ...]:
        """Of inputs that have text; none where one has not."""
        if not all(one.prompt for one in inputs):
            return ()
        texts = (Text(one.prompt, one.answer if self.with_answers else "") for one in inputs)
        return self.clean.keywords([words(_joined(text)) for text in texts])


def directions(
    inputs: Inputs, names: Sequence[str], flags: Mapping[tuple[str, str], int], labels: Labels
) -> tuple[Shown, ...]:
    """The directions worth telling of: first those that flagged most rows, then those whose rows share most."""

    def group(extremes: Extremes, column: int, side: Side) -> Group:
        found = extremes.end(column, high=side == "high")
        return Group(inputs=found, keywords=labels.keywords(found))

    def end(column: int, side: Side) -> End:
        n = flags.get((names[column], side), 0)
        return End(
            side=side,
            rows=group(inputs.calm, column, side),
            flags=n,
            flagged=group(inputs.quarantined, column, side) if n else Group(),
        )

    def worth(one: Shown) -> tuple[int, float]:
        shared = [k.at_least for each in one.ends for k in (*each.rows.keywords, *each.flagged.keywords)]
        return -sum(each.flags for each in one.ends), -max(shared, default=0.0)

    found = [Shown(direction=name, ends=(end(column, "high"), end(column, "low"))) for column, name in enumerate(names)]
    return tuple(sorted(found, key=worth)[:SHOWN])  # sorted is stable: else the order of the bank


def labelled(shown: Sequence[Shown], endpoint: LabelEndpoint) -> tuple[tuple[Shown, ...], str]:
    """The same with a label for every group that has text, and why there are no more of them."""
    failed = ""

    def asked(group: Group) -> Group:
        nonlocal failed
        if failed or not group.inputs or not all(one.prompt for one in group.inputs):
            return group
        try:
            return replace(group, label=endpoint.label([_joined(Text(i.prompt, i.answer)) for i in group.inputs]))
        except LabelUnavailable as error:
            failed = str(error)
            return group

    def both(end: End) -> End:
        return replace(end, flagged=asked(end.flagged), rows=asked(end.rows))

    found = tuple(replace(one, ends=(both(one.ends[0]), both(one.ends[1]))) for one in shown)
    return found, failed


def conformal_report(
    state: WatchState,
    bank: Bank,
    inputs: Inputs,
    alerts: Sequence[Alert],
    labels: Labels,
    *,
    fpr: float,
    told: Mapping[str, Any],
    out: Path,
) -> WatchReport:
    """What a watch says whose rate is set.

    Args:
        alerts: those to choose from.
        told: the fields that the command knows: base, tuned, skipped.
        out: the folder of the watch.
    """
    calibration = state.monitor.calibration
    verdicts = Verdicts.read(out / "verdicts.jsonl", state.written, edges_of(calibration, state.monitor.threshold))
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
        out=str(out),
        **told,
    )


def published_report(
    state: PublishedState, bank: Bank, inputs: Inputs, labels: Labels, *, told: Mapping[str, Any], out: Path
) -> WatchReport:
    """What a watch says whose range takes in every row. Arguments as `conformal_report`."""
    verdicts = Verdicts.read(out / "verdicts.jsonl", state.written, edges_of(state.held_out, 0.0))
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
        out=str(out),
        **told,
    )


def _report(
    inputs: Inputs, names: Sequence[str], verdicts: Verdicts, labels: Labels, *, rows: int, flagged: int, **told: Any
) -> WatchReport:
    shown, failed = directions(inputs, names, verdicts.flags, labels), ""
    if labels.endpoint is not None:
        shown, failed = labelled(shown, labels.endpoint)
    return WatchReport(
        rows=rows,
        flagged=flagged,
        share_flagged=proportion(flagged, rows) if rows else None,
        shown=shown,
        labelled_by="" if labels.endpoint is None else labels.endpoint.model,
        label_error=failed,
        no_text=inputs.no_text,
        **told,
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
    )


def _of_verdict(told: Mapping[str, Any], texts: Mapping[int, Text]) -> Flagged:
    text = texts.get(told["line"])
    return Flagged(
        request=f"line {told['line']}",
        direction=f"{told['direction']}, {told['side']}",
        span=(told["token"], told["token"] + 1),
        score=told["score"],
        p_value=None,
        text="" if text is None else text.prompt,
        answer=None if text is None else text.answer,
    )


def _joined(text: Text) -> str:
    return f"{text.prompt}\n{text.answer}" if text.answer else text.prompt
