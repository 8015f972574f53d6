"""What each score flags of the rows that were read, by what it was calibrated on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from experiments.watch.read import Read
from molehunt.errors import NotTestable
from molehunt.measure.threshold import conformal_threshold
from molehunt.traffic.split import Calibrate, Fit
from molehunt.watch.monitor import FitScore, Monitor
from molehunt.watch.profile import Profile
from molehunt.watch.ranges import RunningRange
from molehunt.watch.scores import MahalanobisScore, RangeExceedance, TailSum
from molehunt.watch.simulate import simulate
from molehunt.watch.strata import PromptStrata
from molehunt.watch.suspects import suspicious

RATES = (0.01, 0.001)
CONTAMINATED = (0.002, 0.005, 0.01, 0.02, 0.05)
"""Shares of the calibration rows that are triggered ones."""
EXCLUDED = "suspicious rows excluded"


@runtime_checkable
class Repeats(Protocol):
    """How many attacks come again, and how often."""

    @property
    def repeated(self) -> int: ...
    @property
    def repeats(self) -> int: ...


Parts = Mapping[tuple[str, str], Sequence[Profile]]
"""Bank and group of rows → the rows along that bank's columns."""


@dataclass(frozen=True)
class Calibration:
    """The rows that calibrate, whether strata of prompts have thresholds of their own, and whether suspicious rows stay."""

    fit: Sequence[str]
    calibrate: Sequence[str]
    stratified: bool
    trust: bool = False


def calibrations(kinds: Sequence[str], *, mixed: bool) -> dict[str, Calibration]:
    """By name; `mixed` calibrations have rows of all traffic that is not for testing."""
    fit, calibrate = ([kind for kind in kinds if kind.startswith(split)] for split in ("fit", "calibrate"))
    own = Calibration(["fit"], ["calibrate"], stratified=False)
    every = Calibration(fit, calibrate, stratified=True)
    found = {"own": own, "own, every row trusted": replace(own, trust=True)}
    if mixed:
        found |= {
            "mixed": every,
            "mixed, every row trusted": replace(every, trust=True),
            "mixed, one stratum": replace(every, stratified=False),
        }
    return found


def not_suspicious(
    read: Mapping[str, Read], parts: Parts, calibration: Calibration, rate: float
) -> Callable[[str], Tensor]:
    """By group of rows, which of them are not suspicious, compared with all that the calibration is made on."""
    fit, calibrate = (
        tuple(row for kind in kinds for row in _rows(parts, calibration, "tail sum", kind))
        for kinds in (calibration.fit, calibration.calibrate)
    )
    prompts = Monitor.fit(Fit(fit), Calibrate(calibrate), fpr=rate).strata
    ratios = [ratio for kind in (*calibration.fit, *calibration.calibrate) for ratio in read[kind].log_ratio.tolist()]
    limits = torch.tensor(suspicious(ratios, prompts.of(torch.stack([row.prompt for row in (*fit, *calibrate)])))[0])

    def kept(kind: str) -> Tensor:
        rows = _rows(parts, calibration, "tail sum", kind)
        return read[kind].log_ratio <= limits[prompts.of(torch.stack([row.prompt for row in rows]))]

    return kept


def _rows(parts: Parts, calibration: Calibration, bank: str, kind: str) -> Sequence[Profile]:
    rows = parts[bank, kind]
    return rows if calibration.stratified else [replace(row, prompt=row.prompt[:0]) for row in rows]


def flagged(
    read: Mapping[str, Read], parts: Parts, calibration: Calibration, rate: float, controls: bool
) -> dict[str, Any]:
    """By score, how many rows of each group; empty where the rows cannot hold the rate."""
    tests = [kind for kind in read if not kind.startswith(("fit", "calibrate"))]
    try:
        accepted = not_suspicious(read, parts, calibration, rate)
    except NotTestable:
        return {}
    kept = {
        kind: torch.ones(len(read[kind].profiles), dtype=torch.bool) if calibration.trust else accepted(kind)
        for kind in (*calibration.fit, *calibration.calibrate)
    }

    def counts(flags: Callable[[str], Tensor]) -> dict[str, int]:
        found = {kind: flags(kind) for kind in tests}
        flagged_rows = {kind: int(one.sum()) for kind, one in found.items()}
        return flagged_rows | ({NOT_SUSPICIOUS: int(found["clean"][accepted("clean")].sum())} if controls else {})

    def monitored(bank: str, score: FitScore = TailSum.fit) -> tuple[Monitor, dict[str, int]]:
        def clean(kinds: Sequence[str]) -> Iterator[Profile]:
            for kind in kinds:
                rows = zip(_rows(parts, calibration, bank, kind), kept[kind], strict=True)
                yield from (row for row, keep in rows if keep)

        monitor = Monitor.fit(
            Fit(tuple(clean(calibration.fit))), Calibrate(tuple(clean(calibration.calibrate))), fpr=rate, score=score
        )
        return monitor, counts(lambda kind: monitor.scores(_rows(parts, calibration, bank, kind)) > monitor.threshold)

    try:
        monitor, found = monitored("tail sum")
    except NotTestable:
        return {}
    by_score = {"tail sum": found}
    if not controls:
        return by_score
    for name in ("random directions", "shuffled ΔW"):
        by_score[name] = monitored(name)[1]
    by_score["range exceedance"] = monitored("tail sum", RangeExceedance.fit)[1]
    by_score["Mahalanobis"] = monitored("tail sum", MahalanobisScore.fit)[1]
    for name, value in PAIR.items():
        by_score[name] = counts(_by_stratum(monitor.strata, read, kept, calibration, rate, value))
    ranges = RunningRange.empty(read["fit"].cosines[0].shape[1])
    for kind in (*calibration.fit, *calibration.calibrate):
        ranges.absorb(*(cosines[kept[kind]] for cosines in read[kind].cosines))
    by_score["published range"] = counts(lambda kind: ranges.first_sight(*read[kind].cosines))
    return by_score


NOT_SUSPICIOUS = "clean, answered as the base might"
"""Clean rows that are not suspicious."""
PAIR: Mapping[str, Callable[[Read], Tensor]] = {
    "‖Δ‖ of the pair": lambda one: one.delta,
    "answer log ratio of the pair": lambda one: one.log_ratio,
}


def _by_stratum(
    strata: PromptStrata,
    read: Mapping[str, Read],
    kept: Mapping[str, Tensor],
    calibration: Calibration,
    rate: float,
    value: Callable[[Read], Tensor],
) -> Callable[[str], Tensor]:
    """A score that needs no fitting, with a threshold for each stratum of prompts."""

    def strata_of(one: Read) -> Tensor:
        features = torch.stack([row.prompt for row in one.profiles])
        return torch.tensor(strata.of(features if calibration.stratified else features[:, :0]))

    clean = torch.cat([value(read[kind])[kept[kind]] for kind in calibration.calibrate])
    of = torch.cat([strata_of(read[kind])[kept[kind]] for kind in calibration.calibrate])
    thresholds = torch.tensor([conformal_threshold(clean[of == kind], rate) for kind in range(strata.n)])
    return lambda kind: value(read[kind]) > thresholds[strata_of(read[kind])]


def contaminated(read: Mapping[str, Read], parts: Parts, rate: float, contaminants: int) -> dict[str, dict[str, int]]:
    """Share of triggered rows among the calibration ones → how many other triggered rows are flagged of `n`."""
    halves = [_with_ratios(read, parts, kind) for kind in ("fit", "calibrate")]
    triggered = _with_ratios(read, parts, "triggered")
    bad, test = triggered[:contaminants], [row for row, _ in triggered[contaminants:]]
    found: dict[str, dict[str, int]] = {}
    for share in CONTAMINATED:
        counts = [round(share * len(half)) for half in halves]
        mixed = [[*bad[: counts[0]], *halves[0][counts[0] :]]]
        mixed.append([*bad[counts[0] : sum(counts)], *halves[1][counts[1] :]])
        ratios = [ratio for half in mixed for _, ratio in half]
        (limit,), _ = suspicious(ratios, [0] * len(ratios))
        counted = {"n": len(test), "planted": sum(counts)}
        counted["excluded"] = sum(ratio > limit for ratio in ratios)
        counted["planted excluded"] = sum(ratio > limit for _, ratio in bad[: sum(counts)])
        for name, highest in (("every row trusted", float("inf")), (EXCLUDED, limit)):
            fit, calibrate = (tuple(row for row, ratio in half if ratio <= highest) for half in mixed)
            monitor = Monitor.fit(Fit(fit), Calibrate(calibrate), fpr=rate)
            counted[name] = int((monitor.scores(test) > monitor.threshold).sum())
        found[f"{share:g}"] = counted
    return found


def repeated(
    read: Mapping[str, Read], parts: Parts, accepted: Callable[[str], Tensor], rate: float, written: int, size: Repeats
) -> dict[str, dict[str, Any]]:
    """Monitor and order → share of attacks flagged at their 1st, 10th, 100th appearance, and of benign rows."""
    halves = [
        [row for (row, _), keep in zip(_with_ratios(read, parts, kind), accepted(kind), strict=True) if keep]
        for kind in ("fit", "calibrate")
    ]
    monitor = Monitor.fit(Fit(tuple(halves[0])), Calibrate(tuple(halves[1])), fpr=rate)
    benign, attacks = ([row for row, _ in _with_ratios(read, parts, kind)] for kind in ("clean", "triggered"))
    simulated = simulate(
        monitor, [*halves[0], *halves[1]], benign, attacks[: size.repeated], written=written, repeats=size.repeats
    )
    return {
        f"{one.monitor} | {one.order}": {
            **{str(n): share.estimate for n, share in one.by_repeat.items()},
            "benign": one.fpr.estimate,
        }
        for one in simulated
    }


def _with_ratios(read: Mapping[str, Read], parts: Parts, kind: str) -> list[tuple[Profile, float]]:
    """Rows along the changed directions, of one stratum, each with its answer's log ratio."""
    rows = [replace(row, prompt=row.prompt[:0]) for row in parts["tail sum", kind]]
    return list(zip(rows, read[kind].log_ratio.tolist(), strict=True))
