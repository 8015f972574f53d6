"""A stress test of one fix against a behaviour that is a number for each row: a choice between tokens, a linear probe.

What `text_behaviour` is for answers: attacks as published beside the shortest, the four controls, drift. Rows of one
cluster (a question in other orders, a template) are not independent, so that every interval is over clusters.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from molehunt.errors import NotTestable
from molehunt.measure.interval import Interval, cluster_bootstrap, proportion
from molehunt.run.progress import Track, silent
from molehunt.stress.attack import PUBLISHED, SEARCH, AttackConfig, Attacked, Runs, attack, least_attack
from molehunt.stress.constraint import Constraint, Free
from molehunt.stress.drift import Drift, Watched, drift_of
from molehunt.stress.norms import curve, epsilon50, needed, times_longer
from molehunt.stress.objective import Objective
from molehunt.stress.specificity import random_pushes, universal_pushes


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadoutCase:
    """The rows that are attacked: those whose behaviour the fix took away."""

    defended: Runs
    wanted: Objective
    """The behaviour."""
    random: Objective
    """Something that the fix never had to do with, as hard to ask for."""
    undefended: Runs
    """As many rows without the fix."""
    flipped: Objective
    """What those do not do by themselves."""
    watched: Watched
    """What the fix holds still."""
    constraints: tuple[Constraint, ...]
    """Of the arms, such as `Free`, `Paper`, `Exact`; the last is the one that counts."""
    clusters: tuple[Hashable, ...]
    unit: float
    """Of all lengths, such as the median ‖h‖ at the site."""


@dataclass(frozen=True, kw_only=True)
class ReadoutConfig:
    """How hard to try."""

    published: AttackConfig = PUBLISHED["ioi"]
    """Of the arms as published: all steps, one ball."""
    ball: float = 1.0
    """Theirs, in units."""
    most: float = 8.0
    """Of the search for the shortest, in units."""
    steps: int = SEARCH.steps
    levels: int = 9
    seed: int = 0

    @property
    def search(self) -> AttackConfig:
        """Rows are done as soon as they flip: what is sought is a length."""
        return replace(SEARCH, steps=self.steps, positions=self.published.positions, seed=self.seed)


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadoutArm:
    """One attack on all rows."""

    name: str
    clusters: tuple[Hashable, ...]
    delta: Float[Tensor, "rows positions d_model"]
    margin: Float[Tensor, " rows"]
    back: Bool[Tensor, " rows"]
    length: Float[Tensor, " rows"]
    """‖δ‖ in units."""
    drift: Drift

    @property
    def recovered(self) -> Interval:
        return clustered_share(self.back, self.clusters)

    @property
    def lengths(self) -> Float[Tensor, " rows"]:
        """What each row took; infinite where it is not back."""
        return needed(self.length, self.back)

    @property
    def epsilon50(self) -> Interval | None:
        return epsilon50(self.lengths, self.clusters)

    def curve(self, at: Sequence[float]) -> list[float]:
        return curve(self.lengths, at)


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadoutControl:
    """One control on the rows of the last shortest arm."""

    recovered: Interval
    lengths: Float[Tensor, " rows"] | None = None
    """Where the control searches for its own shortest push."""
    epsilon50: Interval | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadoutStudy:
    """Everything that was measured."""

    n: int
    clusters: int
    unit: float
    nothing: Interval
    """Rows that are back under δ = 0: 0, or the harness is wrong."""
    published: tuple[ReadoutArm, ...]
    """One ball for all, every step: as published."""
    shortest: tuple[ReadoutArm, ...]
    controls: Mapping[str, ReadoutControl]
    gap: Interval | None
    """How many times longer a push to a random target must be than one to the behaviour."""
    gain: Interval | None
    """How many times longer a push to the behaviour must be than one that flips a row without the fix."""
    held: Interval | None
    """How many times longer the last arm's push must be than the first's, which no constraint holds."""

    @property
    def verdict(self) -> str:
        """What the last arm shows, as `Study.verdict` says it. Nothing here says that a fix is safe."""
        last, random = self.shortest[-1], self.controls["random push"]
        if last.recovered.low <= random.recovered.high:
            return "NOT BROUGHT BACK"
        if self.gap is None or self.gap.low <= 1 <= self.gap.high:
            return "UNDECIDED"
        return "RECOVERABLE" if self.gap.low > 1 else "OVERRIDDEN"


def clustered_share(back: Bool[Tensor, " rows"], clusters: Sequence[Hashable], *, seed: int = 0) -> Interval:
    """Share of rows, with limits from a bootstrap over clusters; `n` counts them.

    Where all rows agree a bootstrap knows no spread: then the exact limits of as many trials as there are clusters, as
    they are for a single one.
    """
    m, share = len(set(clusters)), float(back.float().mean()) if len(back) else 0.0
    if m < 2 or share in (0.0, 1.0):
        exact = proportion(round(share * m), m)
        return Interval(share, min(exact.low, share), max(exact.high, share), m)
    return cluster_bootstrap(back.float(), clusters, lambda rows: float(rows.mean()), seed=seed)


def stress_readout(
    case: ReadoutCase, config: ReadoutConfig = ReadoutConfig(), *, track: Track = silent
) -> ReadoutStudy:
    """Try to bring a suppressed behaviour back.

    Args:
        case: what is attacked.
        config: how hard.
        track: shown steps and levels.

    Raises:
        NotTestable: there is no row, or a row shows the behaviour under δ = 0.
    """
    n = len(case.clusters)
    if not n:
        raise NotTestable("The fix takes the behaviour away from no row, so there is nothing to bring back.")
    with torch.no_grad():
        nothing = (case.wanted(case.defended(case.defended.entering)).margin > 0).cpu()
    published = tuple(
        _arm(case, constraint, _published(case, constraint, config, track)) for constraint in case.constraints
    )
    shortest = tuple(
        _arm(case, constraint, _least(case.defended, case.wanted, constraint, case.unit, config, track))
        for constraint in case.constraints
    )
    last = shortest[-1]
    controls = _controls(case, last, config, track)
    random, flipped = (controls[name].lengths for name in ("random target", "undefended"))
    assert random is not None and flipped is not None
    return ReadoutStudy(
        n=n,
        clusters=len(set(case.clusters)),
        unit=case.unit,
        nothing=clustered_share(nothing, case.clusters),
        published=published,
        shortest=shortest,
        controls=controls,
        gap=times_longer(random, last.lengths, case.clusters),
        gain=times_longer(last.lengths, flipped, case.clusters),
        held=times_longer(last.lengths, shortest[0].lengths, case.clusters),
    )


def _published(case: ReadoutCase, constraint: Constraint, config: ReadoutConfig, track: Track) -> Attacked:
    radius = torch.full((len(case.clusters),), config.ball * case.unit, device=case.defended.entering.device)
    chosen = replace(config.published, seed=config.seed)
    return attack(case.defended, case.wanted, constraint, radius, chosen, track=track)


def _least(
    runs: Runs, objective: Objective, constraint: Constraint, unit: float, config: ReadoutConfig, track: Track
) -> Attacked:
    most = torch.full((len(runs.entering),), config.most * unit, device=runs.entering.device)
    return least_attack(runs, objective, constraint, most, config.search, levels=config.levels, track=track)


def _arm(case: ReadoutCase, constraint: Constraint, found: Attacked) -> ReadoutArm:
    defended = case.defended.entering[:, : found.delta.shape[1]]
    return ReadoutArm(
        name=constraint.name,
        clusters=case.clusters,
        delta=found.delta,
        margin=found.margin.cpu(),
        back=found.recovered.cpu(),
        length=found.norm.cpu() / case.unit,
        drift=drift_of(case.watched, defended, defended + found.delta),
    )


def _controls(case: ReadoutCase, last: ReadoutArm, config: ReadoutConfig, track: Track) -> dict[str, ReadoutControl]:
    """Of the last constraint, but for the second: without the fix there is nothing to hold still."""
    constraint = case.constraints[-1]
    searched = {
        "random target": _least(case.defended, case.random, constraint, case.unit, config, track),
        "undefended": _least(case.undefended, case.flipped, Free(), case.unit, config, track),
    }
    reach = torch.where(last.back, last.length, config.most)
    found: dict[str, ReadoutControl] = {}
    for name, other in searched.items():
        lengths = needed(other.norm.cpu() / case.unit, other.recovered.cpu())
        within = clustered_share(lengths <= reach, case.clusters)
        found[name] = ReadoutControl(recovered=within, lengths=lengths, epsilon50=epsilon50(lengths, case.clusters))
    defended = case.defended.entering[:, : last.delta.shape[1]]
    pushes = {"random push": random_pushes(last.delta, constraint, defended, config.seed)}
    if len(set(case.clusters)) > 1:
        pushes["universal push"] = universal_pushes(last.delta, case.clusters)
    for name, push in pushes.items():
        pushed = case.defended.entering.clone()
        pushed[:, : push.shape[1]] += push
        with torch.no_grad():
            back = (case.wanted(case.defended(pushed)).margin > 0).cpu()
        found[name] = ReadoutControl(recovered=clustered_share(back, case.clusters))
    return found
