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
from molehunt.stress.attacks.attack import PUBLISHED, AttackConfig, AttackResult, ForwardPass, attack
from molehunt.stress.attacks.constraint import Constraint, Free
from molehunt.stress.attacks.objective import Objective
from molehunt.stress.attacks.shortest import SEARCH, shortest_attack
from molehunt.stress.defences.watched import WatchedValues
from molehunt.stress.evaluation.drift import WatchedDrift, drift_of
from molehunt.stress.evaluation.norms import curve, epsilon50, recovery_lengths, times_longer
from molehunt.stress.evaluation.specificity import random_perturbations, universal_perturbations


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadoutCase:
    """The rows that are attacked: those whose behaviour the fix took away."""

    defended: ForwardPass
    wanted: Objective
    """The behaviour."""
    random: Objective
    """Something that the fix never had to do with, as hard to ask for."""
    undefended: ForwardPass
    """As many rows without the fix."""
    flipped: Objective
    """What those do not do by themselves."""
    watched: WatchedValues
    """What the fix holds still."""
    constraints: tuple[Constraint, ...]
    """Constraints of the arms, such as `Free`, `Paper`, `Exact`; the last is the one that counts."""
    clusters: tuple[Hashable, ...]
    unit: float
    """Unit of all lengths, such as the median ‖h‖ at the site."""


@dataclass(frozen=True, kw_only=True)
class ReadoutConfig:
    """How hard to try."""

    published: AttackConfig = PUBLISHED["ioi"]
    """Attack of the arms as published: all steps, one ball."""
    ball: float = 1.0
    """Radius of their ball, in units."""
    max_norm: float = 8.0
    """Largest norm in the search for the shortest perturbation, in units."""
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
    is_recovered: Bool[Tensor, " rows"]
    length: Float[Tensor, " rows"]
    """‖δ‖ in units."""
    drift: WatchedDrift

    @property
    def recovered(self) -> Interval:
        return clustered_share(self.is_recovered, self.clusters)

    @property
    def lengths(self) -> Float[Tensor, " rows"]:
        """What each row took; infinite where it is not back."""
        return recovery_lengths(self.length, self.is_recovered)

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
        last, random = self.shortest[-1], self.controls["random perturbation"]
        if last.recovered.low <= random.recovered.high:
            return "NOT RECOVERED"
        if self.gap is None or self.gap.low <= 1 <= self.gap.high:
            return "UNDECIDED"
        return "RECOVERABLE" if self.gap.low > 1 else "OVERRIDDEN"


def clustered_share(recovered: Bool[Tensor, " rows"], clusters: Sequence[Hashable], *, seed: int = 0) -> Interval:
    """Share of rows, with limits from a bootstrap over clusters; `n` counts them.

    Where all rows agree a bootstrap knows no spread: then the exact limits of as many trials as there are clusters, as
    they are for a single one.
    """
    m, share = len(set(clusters)), float(recovered.float().mean()) if len(recovered) else 0.0
    if m < 2 or share in (0.0, 1.0):
        exact = proportion(round(share * m), m)
        return Interval(share, min(exact.low, share), max(exact.high, share), m)
    return cluster_bootstrap(recovered.float(), clusters, lambda rows: float(rows.mean()), seed=seed)


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


def _published(case: ReadoutCase, constraint: Constraint, config: ReadoutConfig, track: Track) -> AttackResult:
    radius = torch.full((len(case.clusters),), config.ball * case.unit, device=case.defended.entering.device)
    chosen = replace(config.published, seed=config.seed)
    return attack(case.defended, case.wanted, constraint, radius, chosen, track=track)


def _least(
    runs: ForwardPass, objective: Objective, constraint: Constraint, unit: float, config: ReadoutConfig, track: Track
) -> AttackResult:
    radius = torch.full((len(runs.entering),), config.max_norm * unit, device=runs.entering.device)
    return shortest_attack(runs, objective, constraint, radius, config.search, levels=config.levels, track=track)


def _arm(case: ReadoutCase, constraint: Constraint, found: AttackResult) -> ReadoutArm:
    defended = case.defended.entering[:, : found.delta.shape[1]]
    return ReadoutArm(
        name=constraint.name,
        clusters=case.clusters,
        delta=found.delta,
        margin=found.margin.cpu(),
        is_recovered=found.recovered.cpu(),
        length=found.norm.cpu() / case.unit,
        drift=drift_of(case.watched, defended, defended + found.delta),
    )


def _controls(case: ReadoutCase, last: ReadoutArm, config: ReadoutConfig, track: Track) -> dict[str, ReadoutControl]:
    """Controls of the last constraint; the undefended one is free, since without the fix there is nothing to keep unchanged."""
    constraint = case.constraints[-1]
    searched = {
        "random target": _least(case.defended, case.random, constraint, case.unit, config, track),
        "undefended": _least(case.undefended, case.flipped, Free(), case.unit, config, track),
    }
    reach = torch.where(last.is_recovered, last.length, config.max_norm)
    found: dict[str, ReadoutControl] = {}
    for name, other in searched.items():
        lengths = recovery_lengths(other.norm.cpu() / case.unit, other.recovered.cpu())
        within = clustered_share(lengths <= reach, case.clusters)
        found[name] = ReadoutControl(recovered=within, lengths=lengths, epsilon50=epsilon50(lengths, case.clusters))
    defended = case.defended.entering[:, : last.delta.shape[1]]
    pushes = {"random perturbation": random_perturbations(last.delta, constraint, defended, config.seed)}
    if len(set(case.clusters)) > 1:
        pushes["universal perturbation"] = universal_perturbations(last.delta, case.clusters)
    for name, push in pushes.items():
        pushed = case.defended.entering.clone()
        pushed[:, : push.shape[1]] += push
        with torch.no_grad():
            back = (case.wanted(case.defended(pushed)).margin > 0).cpu()
        found[name] = ReadoutControl(recovered=clustered_share(back, case.clusters))
    return found
