"""The attack: the perturbation after the clamp that brings the behaviour back, for every row of a batch at once.

Published (arXiv 2606.18322): Adam on δ, from 0, clipped to one ball. Here each row has a ball of its own, leaves the batch
once it has reached its margin, and its least norm is searched, so that a result is a length and not a yes.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from molehunt.run.progress import Track, silent
from molehunt.stress.constraint import Constraint, OfRows
from molehunt.stress.objective import Objective

TINY = 1e-12
ROUNDING = 1e-5
"""By which a perturbation may be longer than its ball."""
PENALTY = 10.0
"""On what a constraint cannot hold by itself."""


@runtime_checkable
class Runs(Protocol):
    """What a perturbation enters: a `Suffix`, or something as simple as a readout."""

    @property
    def entering(self) -> Float[Tensor, "batch pos d_model"]: ...

    def __call__(self, entering: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch ..."]: ...

    def rows(self, kept: Int[Tensor, " kept"]) -> "Runs": ...


@dataclass(frozen=True, eq=False)
class Pooled:
    """Activations that a readout reads themselves: nothing runs."""

    entering: Float[Tensor, "batch pos d_model"]

    def __call__(self, entering: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return entering

    def rows(self, kept: Int[Tensor, " kept"]) -> "Pooled":
        return Pooled(self.entering[kept])


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """How to look for a perturbation."""

    steps: int = 150
    lr: float = 0.1
    """Length of a first step, in units of each row's radius."""
    optimiser: Literal["adam", "gradient"] = "adam"
    """`gradient`: along each row's normalised gradient, the length falling as a cosine."""
    positions: int = 1
    """From the anchor on, that may be perturbed."""
    enough: float = 0.5
    """The margin at which a row is done; without one (infinite), all steps are run, as published."""
    restarts: int = 1
    """The first from 0, others from random directions of a tenth of the radius; the best of a row counts."""
    seed: int = 0


PUBLISHED = {
    "unlearning": AttackConfig(steps=150, lr=0.19, enough=torch.inf),
    "ioi": AttackConfig(steps=100, lr=0.14, enough=torch.inf),
    "refusal": AttackConfig(steps=150, lr=0.34, enough=torch.inf),
}
"""ArXiv 2606.18322, table 11 and logs, per radius: Adam at .08, .1 and .1 on √d of 48, 28 and 136 (eight layers), balls
of 20, 20 and 40. TPP has a closed form (`least_norm`) and no published code.
"""

SEARCH = AttackConfig(steps=40, lr=0.3, optimiser="gradient", enough=0.0)
"""For the shortest. On embedded models 15 to 20 % shorter than Adam's of as many steps, and no longer with five times as many."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Attacked:
    """What was found for each row of a batch."""

    delta: Float[Tensor, "batch positions d_model"]
    """As it is added: after the constraint, inside the ball."""
    margin: Float[Tensor, " batch"]
    """With it."""
    crossed: Float[Tensor, " batch"]
    """How far it is outside its constraint."""

    @property
    def norm(self) -> Float[Tensor, " batch"]:
        """Frobenius, over all positions."""
        return self.delta.flatten(1).norm(dim=1)

    @property
    def recovered(self) -> Bool[Tensor, " batch"]:
        """Rows whose behaviour is back, inside the constraint."""
        return (self.margin > 0) & (self.crossed <= 0)


def attack(
    runs: Runs,
    objective: Objective,
    constraint: Constraint,
    radius: Float[Tensor, " batch"],
    config: AttackConfig = AttackConfig(),
    *,
    start: Float[Tensor, "batch positions d_model"] | None = None,
    track: Track = silent,
) -> Attacked:
    """The best perturbation of at most `radius` for each row.

    Args:
        runs: what it enters.
        objective: what it is for.
        constraint: what it may not change.
        radius: of each row's ball (Frobenius over its positions), above 0.
        config: how to look.
        start: where to begin (the first restart); 0 without it.
        track: shown steps.

    Returns:
        For each row the perturbation with the largest margin that keeps the constraint; 0 where none does better than 0.
    """
    if not bool((radius > 0).all()) or len(radius) != len(runs.entering):
        raise ValueError(f"each of {len(runs.entering)} rows needs a radius above 0, got {radius}")
    rng = torch.Generator().manual_seed(config.seed)
    shape = (len(radius), config.positions, runs.entering.shape[-1])
    best: Attacked | None = None
    for restart in range(config.restarts):
        if restart == 0:
            begin = torch.zeros(shape) if start is None else start
        else:
            noise = torch.randn(shape, generator=rng)
            begin = 0.1 * radius.cpu()[:, None, None] * noise / noise.flatten(1).norm(dim=1)[:, None, None]
        found = _descent(runs, objective, constraint, radius, config, begin.to(runs.entering.device), track)
        best = found if best is None else _with(best, torch.arange(len(radius), device=found.margin.device), found)
    assert best is not None
    return best


def _descent(
    runs: Runs,
    objective: Objective,
    constraint: Constraint,
    radius: Tensor,
    config: AttackConfig,
    begin: Tensor,
    track: Track,
) -> Attacked:
    n = len(radius)
    best = Attacked(
        delta=torch.zeros_like(begin),
        margin=torch.full((n,), -torch.inf, device=begin.device),
        crossed=torch.zeros(n, device=begin.device),
    )
    live, raw = torch.arange(n, device=begin.device), begin
    steps = _Adam(raw) if config.optimiser == "adam" else _Gradient(config.steps)
    for step in track(range(config.steps + 1), "attack", config.steps + 1):
        raw = _clipped(raw, constraint, runs.entering, radius)
        tried, slope = _tried(runs, objective, constraint, raw)
        best = _with(best, live, tried)
        if step == config.steps:
            break
        raw = raw + config.lr * radius[:, None, None] * steps(constraint.gradient(slope))
        going = ~(best.recovered & (best.margin >= config.enough))[live]
        if not bool(going.all()):
            kept = going.nonzero()[:, 0]
            if not len(kept):
                break
            live, raw, radius = live[kept], raw[kept], radius[kept]
            runs, objective, constraint = runs.rows(kept), objective.rows(kept), _of_rows(constraint, kept)
            steps.rows(kept)
    return best


def _tried(runs: Runs, objective: Objective, constraint: Constraint, raw: Tensor) -> tuple[Attacked, Tensor]:
    """What a perturbation does, and the slope of its loss."""
    raw = raw.detach().requires_grad_()
    with torch.enable_grad():
        delta = constraint(raw, runs.entering[:, : raw.shape[1]])
        pushed = runs.entering.clone()
        pushed[:, : raw.shape[1]] += delta
        crossed = constraint.crossed(pushed, runs.entering)
        reached = objective(runs(pushed))
        (slope,) = torch.autograd.grad((reached.loss + PENALTY * crossed).sum(), raw)
    return Attacked(delta=delta.detach(), margin=reached.margin.detach().float(), crossed=crossed.detach()), slope


def _of_rows(constraint: Constraint, kept: Tensor) -> Constraint:
    return constraint.rows(kept) if isinstance(constraint, OfRows) else constraint


@torch.no_grad()
def _clipped(raw: Tensor, constraint: Constraint, defended: Tensor, radius: Tensor) -> Tensor:
    """Shortened until what is added fits the ball; a few times, for constraints that turn are not linear."""
    for _ in range(8):
        length = constraint(raw, defended[:, : raw.shape[1]]).flatten(1).norm(dim=1)
        if bool((length <= radius * (1 + ROUNDING)).all()):
            break
        raw = raw * (radius / length.clamp_min(TINY)).clamp_max(1)[:, None, None]
    return raw


def _with(best: Attacked, live: Tensor, tried: Attacked) -> Attacked:
    """Better rows in their place: inside the constraint before outside of it, then the larger margin."""
    inside, held = tried.crossed <= 0, best.crossed[live] <= 0
    held &= best.margin[live] > -torch.inf  # nothing was tried yet
    better = (inside & ~held) | ((inside == held) & (tried.margin > best.margin[live]))
    where = live[better]
    found = [one.clone() for one in (best.delta, best.margin, best.crossed)]
    for old, new in zip(found, (tried.delta, tried.margin, tried.crossed), strict=True):
        old[where] = new[better]
    return Attacked(delta=found[0], margin=found[1], crossed=found[2])


class _Adam:
    """Adam's direction, of length 1 a row where all coordinates move alike."""

    def __init__(self, like: Tensor) -> None:
        self._first, self._second, self._step = torch.zeros_like(like), torch.zeros_like(like), 0

    def __call__(self, slope: Tensor) -> Tensor:
        self._step += 1
        self._first = 0.9 * self._first + 0.1 * slope
        self._second = 0.999 * self._second + 0.001 * slope.square()
        first = self._first / (1 - 0.9**self._step)
        second = self._second / (1 - 0.999**self._step)
        return -first / (second.sqrt() + TINY) / slope[0].numel() ** 0.5

    def rows(self, kept: Tensor) -> None:
        self._first, self._second = self._first[kept], self._second[kept]


class _Gradient:
    """Each row's normalised gradient, shorter from step to step."""

    def __init__(self, steps: int) -> None:
        self._steps, self._step = steps, 0

    def __call__(self, slope: Tensor) -> Tensor:
        share = 0.5 * (1 + math.cos(math.pi * self._step / self._steps))
        self._step += 1
        return -share * slope / slope.flatten(1).norm(dim=1).clamp_min(TINY)[:, None, None]

    def rows(self, kept: Tensor) -> None:
        """Rows share nothing."""


def least_attack(
    runs: Runs,
    objective: Objective,
    constraint: Constraint,
    most: Float[Tensor, " batch"],
    config: AttackConfig = SEARCH,
    *,
    levels: int = 9,
    track: Track = silent,
) -> Attacked:
    """The shortest perturbation that was found for each row, by bisection of its norm on a logarithmic scale.

    Begins from an attack with the radius `most`, and each level from the last success, shortened. Rows that fail at
    `most` are left as they are there: not recovered.

    Args:
        runs, objective, constraint, config: as in `attack`.
        most: the largest norm of each row.
        levels: halvings of the range from the first success down to 1/1000 of it; 9 leave 1.4 %.
        track: shown levels.
    """
    found = attack(runs, objective, constraint, most, config)
    rows = found.recovered.nonzero()[:, 0]
    if not len(rows):
        return found
    runs, objective, constraint = runs.rows(rows), objective.rows(rows), _of_rows(constraint, rows)
    best = Attacked(delta=found.delta[rows], margin=found.margin[rows], crossed=found.crossed[rows])
    low = best.norm / 1000
    for _ in track(range(levels), "shortest attack", levels):
        middle = (low * best.norm).sqrt().clamp_min(TINY)
        shorter = best.delta * (middle / best.norm.clamp_min(TINY))[:, None, None]
        tried = attack(runs, objective, constraint, middle, config, start=shorter)
        won = tried.recovered & (tried.norm < best.norm)
        low = torch.where(won, low, middle)
        best = _chosen(won, tried, best)
    whole = [one.clone() for one in (found.delta, found.margin, found.crossed)]
    for old, new in zip(whole, (best.delta, best.margin, best.crossed), strict=True):
        old[rows] = new
    return Attacked(delta=whole[0], margin=whole[1], crossed=whole[2])


def _chosen(first: Tensor, one: Attacked, other: Attacked) -> Attacked:
    return Attacked(
        delta=torch.where(first[:, None, None], one.delta, other.delta),
        margin=torch.where(first, one.margin, other.margin),
        crossed=torch.where(first, one.crossed, other.crossed),
    )
