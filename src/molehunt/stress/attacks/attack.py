"""The attack: a perturbation after the defence that makes the behaviour recover, for all rows of a batch at once.

Published (arXiv 2606.18322): Adam on δ, from 0, clipped to one ball. Here each row has a ball of its own, and leaves the
batch once it has reached its margin. `shortest_attack` searches the least norm, so that a result is a length and not a yes.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from molehunt.run.progress import Track, silent
from molehunt.stress.attacks.constraint import Constraint, RowwiseConstraint
from molehunt.stress.attacks.objective import Objective

TINY = 1e-12
ROUNDING = 1e-5
"""Share by which a perturbation may be longer than its ball."""
PENALTY = 10.0
"""Weight in the loss of a constraint's violation."""


@runtime_checkable
class ForwardPass(Protocol):
    """A computation that a perturbation enters: a `Suffix`, or something as simple as a readout."""

    @property
    def entering(self) -> Float[Tensor, "batch pos d_model"]: ...

    def __call__(self, entering: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch ..."]: ...

    def rows(self, kept: Int[Tensor, " kept"]) -> "ForwardPass": ...


@dataclass(frozen=True, eq=False)
class PooledActivations:
    """Activations that a readout reads directly: no model forward."""

    entering: Float[Tensor, "batch pos d_model"]

    def __call__(self, entering: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return entering

    def rows(self, kept: Int[Tensor, " kept"]) -> "PooledActivations":
        return PooledActivations(self.entering[kept])


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Settings of the search for a perturbation."""

    steps: int = 150
    """Number of optimisation steps."""
    lr: float = 0.1
    """Length of the first step, in units of each row's radius."""
    optimiser: Literal["adam", "gradient"] = "adam"
    """`gradient` steps along each row's normalised gradient, with a length that falls as a cosine."""
    positions: int = 1
    """Number of tokens that may be perturbed, from the anchor on."""
    target_margin: float = 0.5
    """Margin at which a row is done. If it is infinite, all steps are taken, as published."""
    restarts: int = 1
    """Number of starts: the first from 0, others from random directions of a tenth of the radius. Each row's best counts."""
    seed: int = 0


PUBLISHED = {
    "unlearning": AttackConfig(steps=150, lr=0.19, target_margin=torch.inf),
    "ioi": AttackConfig(steps=100, lr=0.14, target_margin=torch.inf),
    "refusal": AttackConfig(steps=150, lr=0.34, target_margin=torch.inf),
}
"""ArXiv 2606.18322, table 11 and logs, per radius: Adam at .08, .1 and .1 on √d of 48, 28 and 136 (eight layers), balls
of 20, 20 and 40. TPP has a closed form (`least_norm`) and no published code.
"""


@dataclass(frozen=True, eq=False, kw_only=True)
class AttackResult:
    """The perturbation that was found for each row of a batch."""

    delta: Float[Tensor, "batch positions d_model"]
    """The perturbation as it is added: after the constraint, inside the ball."""
    margin: Float[Tensor, " batch"]
    """The objective's margin under the perturbation."""
    violation: Float[Tensor, " batch"]
    """How far the perturbation is outside its constraint; 0 where the constraint is kept."""

    @property
    def norm(self) -> Float[Tensor, " batch"]:
        """The Frobenius norm over all positions."""
        return self.delta.flatten(1).norm(dim=1)

    @property
    def recovered(self) -> Bool[Tensor, " batch"]:
        """Rows whose behaviour recovered inside the constraint."""
        return (self.margin > 0) & (self.violation <= 0)


def attack(
    forward: ForwardPass,
    objective: Objective,
    constraint: Constraint,
    radius: Float[Tensor, " batch"],
    config: AttackConfig = AttackConfig(),
    *,
    start: Float[Tensor, "batch positions d_model"] | None = None,
    track: Track = silent,
) -> AttackResult:
    """The best perturbation of at most `radius` for each row.

    Args:
        forward: the computation that the perturbation enters.
        objective: what the perturbation is to reach.
        constraint: what the perturbation may not change.
        radius: norm of each row's ball (Frobenius over its positions), above 0.
        config: settings of the search.
        start: perturbation to start from in the first restart; 0 without it.
        track: shows the steps.

    Returns:
        For each row the perturbation with the largest margin that keeps the constraint; 0 where none does better than 0.
    """
    if not bool((radius > 0).all()) or len(radius) != len(forward.entering):
        raise ValueError(f"each of {len(forward.entering)} rows needs a radius above 0, got {radius}")
    rng = torch.Generator().manual_seed(config.seed)
    shape = (len(radius), config.positions, forward.entering.shape[-1])
    best: AttackResult | None = None
    for restart in range(config.restarts):
        if restart == 0:
            first = torch.zeros(shape) if start is None else start
        else:
            noise = torch.randn(shape, generator=rng)
            first = 0.1 * radius.cpu()[:, None, None] * noise / noise.flatten(1).norm(dim=1)[:, None, None]
        found = _descent(forward, objective, constraint, radius, config, first.to(forward.entering.device), track)
        best = found if best is None else _with(best, torch.arange(len(radius), device=found.margin.device), found)
    assert best is not None
    return best


def _descent(
    forward: ForwardPass,
    objective: Objective,
    constraint: Constraint,
    radius: Tensor,
    config: AttackConfig,
    start: Tensor,
    track: Track,
) -> AttackResult:
    n = len(radius)
    best = AttackResult(
        delta=torch.zeros_like(start),
        margin=torch.full((n,), -torch.inf, device=start.device),
        violation=torch.zeros(n, device=start.device),
    )
    live, raw = torch.arange(n, device=start.device), start
    steps = _Adam(raw) if config.optimiser == "adam" else _NormalisedGradient(config.steps)
    for step in track(range(config.steps + 1), "attack", config.steps + 1):
        raw = _clipped(raw, constraint, forward.entering, radius)
        tried, slope = _tried(forward, objective, constraint, raw)
        best = _with(best, live, tried)
        if step == config.steps:
            break
        raw = raw + config.lr * radius[:, None, None] * steps(constraint.gradient(slope))
        going = ~(best.recovered & (best.margin >= config.target_margin))[live]
        if not bool(going.all()):
            kept = going.nonzero()[:, 0]
            if not len(kept):
                break
            live, raw, radius = live[kept], raw[kept], radius[kept]
            forward, objective, constraint = forward.rows(kept), objective.rows(kept), for_rows(constraint, kept)
            steps.rows(kept)
    return best


def _tried(
    forward: ForwardPass, objective: Objective, constraint: Constraint, raw: Tensor
) -> tuple[AttackResult, Tensor]:
    """The result of a perturbation, and the gradient of its loss."""
    raw = raw.detach().requires_grad_()
    with torch.enable_grad():
        delta = constraint(raw, forward.entering[:, : raw.shape[1]])
        perturbed = forward.entering.clone()
        perturbed[:, : raw.shape[1]] += delta
        violation = constraint.violation(perturbed, forward.entering)
        reached = objective(forward(perturbed))
        (slope,) = torch.autograd.grad((reached.loss + PENALTY * violation).sum(), raw)
    return AttackResult(
        delta=delta.detach(), margin=reached.margin.detach().float(), violation=violation.detach()
    ), slope


def for_rows(constraint: Constraint, kept: Tensor) -> Constraint:
    """The same constraint for some rows of the batch."""
    return constraint.rows(kept) if isinstance(constraint, RowwiseConstraint) else constraint


@torch.no_grad()
def _clipped(raw: Tensor, constraint: Constraint, defended: Tensor, radius: Tensor) -> Tensor:
    """Shorten until what is added fits the ball. Constraints that rotate are not linear, so this takes a few rounds."""
    for _ in range(8):
        length = constraint(raw, defended[:, : raw.shape[1]]).flatten(1).norm(dim=1)
        if bool((length <= radius * (1 + ROUNDING)).all()):
            break
        raw = raw * (radius / length.clamp_min(TINY)).clamp_max(1)[:, None, None]
    return raw


def _with(best: AttackResult, live: Tensor, tried: AttackResult) -> AttackResult:
    """Replace rows by better ones: inside the constraint before outside of it, then the larger margin."""
    inside, kept = tried.violation <= 0, best.violation[live] <= 0
    kept &= best.margin[live] > -torch.inf  # nothing was tried yet
    better = (inside & ~kept) | ((inside == kept) & (tried.margin > best.margin[live]))
    where = live[better]
    found = [one.clone() for one in (best.delta, best.margin, best.violation)]
    for old, new in zip(found, (tried.delta, tried.margin, tried.violation), strict=True):
        old[where] = new[better]
    return AttackResult(delta=found[0], margin=found[1], violation=found[2])


class _Adam:
    """Adam's direction. Its length is 1 for a row whose coordinates all move alike."""

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


class _NormalisedGradient:
    """Each row's normalised gradient, shorter from step to step."""

    def __init__(self, steps: int) -> None:
        self._steps, self._step = steps, 0

    def __call__(self, slope: Tensor) -> Tensor:
        share = 0.5 * (1 + math.cos(math.pi * self._step / self._steps))
        self._step += 1
        return -share * slope / slope.flatten(1).norm(dim=1).clamp_min(TINY)[:, None, None]

    def rows(self, kept: Tensor) -> None:
        """Rows share nothing."""
