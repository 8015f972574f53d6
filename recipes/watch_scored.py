"""What each score flags of the rows that were read, by what it was calibrated on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from watch_read import Read

from molehunt.errors import NotTestable
from molehunt.measure.threshold import conformal_threshold
from molehunt.traffic.split import Calibrate, Fit
from molehunt.watch.kinds import PromptKinds
from molehunt.watch.monitor import FitScore, Monitor
from molehunt.watch.profile import Profile
from molehunt.watch.ranges import RunningRange
from molehunt.watch.scores import Mahalanobis, RangeExceedance, TailSum
from molehunt.watch.simulate import simulate
from molehunt.watch.suspects import suspicious

RATES = (0.01, 0.001)
CONTAMINATED = (0.002, 0.005, 0.01, 0.02, 0.05)
"""Shares of the calibration rows that are triggered ones."""
CONTAMINANTS = 100
"""Triggered rows that may be among the calibration ones; the others test."""
REPEATS, REPEATED = 100, 50
"""How often how many attacks come again."""

Parts = Mapping[tuple[str, str], Sequence[Profile]]
"""Bank and kind of row → the rows along that bank's columns."""


@dataclass(frozen=True)
class Setting:
    """What is calibrated on, whether kinds of prompt are told apart, and whether suspicious rows are kept."""

    fit: Sequence[str]
    calibrate: Sequence[str]
    by_kind: bool
    trust: bool = False


def settings(kinds: Sequence[str], *, mixed: bool) -> dict[str, Setting]:
    """By name; `mixed` calibrations have rows of all traffic that is not for testing."""
    fit, calibrate = ([kind for kind in kinds if kind.startswith(split)] for split in ("fit", "calibrate"))
    own = Setting(["fit"], ["calibrate"], by_kind=False)
    every = Setting(fit, calibrate, by_kind=True)
    found = {"own": own, "own, every row trusted": replace(own, trust=True)}
    if mixed:
        found |= {
            "mixed": every,
            "mixed, every row trusted": replace(every, trust=True),
            "mixed, one kind": replace(every, by_kind=False),
        }
    return found


def calm(read: Mapping[str, Read], parts: Parts, setting: Setting, rate: float) -> Callable[[str], Tensor]:
    """By kind of row, which rows are not suspicious, by what is usual among all that the setting calibrates on."""
    fit, calibrate = (
        tuple(row for kind in kinds for row in _rows(parts, setting, "tail sum", kind))
        for kinds in (setting.fit, setting.calibrate)
    )
    prompts = Monitor.fit(Fit(fit), Calibrate(calibrate), fpr=rate).kinds
    ratios = [ratio for kind in (*setting.fit, *setting.calibrate) for ratio in read[kind].log_ratio.tolist()]
    limits = torch.tensor(suspicious(ratios, prompts.of(torch.stack([row.prompt for row in (*fit, *calibrate)])))[0])

    def kept(kind: str) -> Tensor:
        rows = _rows(parts, setting, "tail sum", kind)
        return read[kind].log_ratio <= limits[prompts.of(torch.stack([row.prompt for row in rows]))]

    return kept


def _rows(parts: Parts, setting: Setting, bank: str, kind: str) -> Sequence[Profile]:
    rows = parts[bank, kind]
    return rows if setting.by_kind else [replace(row, prompt=row.prompt[:0]) for row in rows]


def flagged(read: Mapping[str, Read], parts: Parts, setting: Setting, rate: float, controls: bool) -> dict[str, Any]:
    """By score, how many rows of each kind; empty where the rows cannot hold the rate."""
    tests = [kind for kind in read if not kind.startswith(("fit", "calibrate"))]
    usual = calm(read, parts, setting, rate)
    kept = {
        kind: torch.ones(len(read[kind].profiles), dtype=torch.bool) if setting.trust else usual(kind)
        for kind in (*setting.fit, *setting.calibrate)
    }

    def counts(flags: Callable[[str], Tensor]) -> dict[str, int]:
        found = {kind: flags(kind) for kind in tests}
        told = {kind: int(one.sum()) for kind, one in found.items()}
        return told | ({USUAL: int(found["clean"][usual("clean")].sum())} if controls else {})

    def monitored(bank: str, score: FitScore = TailSum.fit) -> tuple[Monitor, dict[str, int]]:
        def clean(kinds: Sequence[str]) -> Iterator[Profile]:
            for kind in kinds:
                rows = zip(_rows(parts, setting, bank, kind), kept[kind], strict=True)
                yield from (row for row, keep in rows if keep)

        monitor = Monitor.fit(
            Fit(tuple(clean(setting.fit))), Calibrate(tuple(clean(setting.calibrate))), fpr=rate, score=score
        )
        return monitor, counts(lambda kind: monitor.scores(_rows(parts, setting, bank, kind)) > monitor.threshold)

    try:
        monitor, found = monitored("tail sum")
    except NotTestable:
        return {}
    told = {"tail sum": found}
    if not controls:
        return told
    for name in ("random directions", "shuffled ΔW"):
        told[name] = monitored(name)[1]
    told["range exceedance"] = monitored("tail sum", RangeExceedance.fit)[1]
    told["Mahalanobis"] = monitored("tail sum", Mahalanobis.fit)[1]
    for name, value in PAIR.items():
        told[name] = counts(_by_kind(monitor.kinds, read, kept, setting, rate, value))
    ranges = RunningRange.empty(read["fit"].cosines[0].shape[1])
    for kind in (*setting.fit, *setting.calibrate):
        ranges.absorb(*(cosines[kept[kind]] for cosines in read[kind].cosines))
    told["published range"] = counts(lambda kind: ranges.first_sight(*read[kind].cosines))
    return told


USUAL = "clean, answered as the base might"
"""Clean rows that are not suspicious."""
PAIR: Mapping[str, Callable[[Read], Tensor]] = {
    "‖Δ‖ of the pair": lambda one: one.delta,
    "answer log ratio of the pair": lambda one: one.log_ratio,
}


def _by_kind(
    kinds: PromptKinds,
    read: Mapping[str, Read],
    kept: Mapping[str, Tensor],
    setting: Setting,
    rate: float,
    value: Callable[[Read], Tensor],
) -> Callable[[str], Tensor]:
    """A score that needs no fitting, with a threshold for each kind of prompt."""

    def kinds_of(one: Read) -> Tensor:
        features = torch.stack([row.prompt for row in one.profiles])
        return torch.tensor(kinds.of(features if setting.by_kind else features[:, :0]))

    clean = torch.cat([value(read[kind])[kept[kind]] for kind in setting.calibrate])
    of = torch.cat([kinds_of(read[kind])[kept[kind]] for kind in setting.calibrate])
    thresholds = torch.tensor([conformal_threshold(clean[of == kind], rate) for kind in range(kinds.n)])
    return lambda kind: value(read[kind]) > thresholds[kinds_of(read[kind])]


def contaminated(read: Mapping[str, Read], parts: Parts, rate: float) -> dict[str, dict[str, int]]:
    """Share of triggered rows among the calibration ones → how many other triggered rows are flagged of `n`."""
    halves = [_with_ratios(read, parts, kind) for kind in ("fit", "calibrate")]
    triggered = _with_ratios(read, parts, "triggered")
    bad, test = triggered[:CONTAMINANTS], [row for row, _ in triggered[CONTAMINANTS:]]
    found: dict[str, dict[str, int]] = {}
    for share in CONTAMINATED:
        counts = [round(share * len(half)) for half in halves]
        mixed = [[*bad[: counts[0]], *halves[0][counts[0] :]]]
        mixed.append([*bad[counts[0] : sum(counts)], *halves[1][counts[1] :]])
        ratios = [ratio for half in mixed for _, ratio in half]
        (limit,), _ = suspicious(ratios, [0] * len(ratios))
        told = {"n": len(test), "planted": sum(counts)}
        told["set aside"] = sum(ratio > limit for ratio in ratios)
        told["planted set aside"] = sum(ratio > limit for _, ratio in bad[: sum(counts)])
        for name, most in (("every row trusted", float("inf")), ("suspicious rows set aside", limit)):
            fit, calibrate = (tuple(row for row, ratio in half if ratio <= most) for half in mixed)
            monitor = Monitor.fit(Fit(fit), Calibrate(calibrate), fpr=rate)
            told[name] = int((monitor.scores(test) > monitor.threshold).sum())
        found[f"{share:g}"] = told
    return found


def repeated(
    read: Mapping[str, Read], parts: Parts, usual: Callable[[str], Tensor], rate: float, written: int
) -> dict[str, dict[str, Any]]:
    """Monitor and order → share of attacks flagged at their 1st, 10th, 100th appearance, and of benign rows."""
    halves = [
        [row for (row, _), keep in zip(_with_ratios(read, parts, kind), usual(kind), strict=True) if keep]
        for kind in ("fit", "calibrate")
    ]
    monitor = Monitor.fit(Fit(tuple(halves[0])), Calibrate(tuple(halves[1])), fpr=rate)
    benign, attacks = ([row for row, _ in _with_ratios(read, parts, kind)] for kind in ("clean", "triggered"))
    told = simulate(monitor, [*halves[0], *halves[1]], benign, attacks[:REPEATED], written=written, repeats=REPEATS)
    return {
        f"{one.monitor} | {one.order}": {
            **{str(n): share.estimate for n, share in one.by_repeat.items()},
            "benign": one.fpr.estimate,
        }
        for one in told
    }


def _with_ratios(read: Mapping[str, Read], parts: Parts, kind: str) -> list[tuple[Profile, float]]:
    """Rows along the changed directions, of one kind of prompt, each with its answer's log ratio."""
    rows = [replace(row, prompt=row.prompt[:0]) for row in parts["tail sum", kind]]
    return list(zip(rows, read[kind].log_ratio.tolist(), strict=True))
