"""A clamp that is grown against attacks: what got round it is held too, and then it is attacked anew.

Each round is a cutting plane. Whether it ends early says how wide the behaviour is: a bottleneck of few directions closes,
a spread one costs a direction each round and utility with it. Directions come from some rows and are judged on others,
beside as many random ones, for any direction that is held makes any attack a little longer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.hardened.threat import displacement
from molehunt.errors import NotTestable
from molehunt.measure.interval import Interval, proportion
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.steer.span_clamp import SpanClamp
from molehunt.stress.attacks.attack import AttackConfig, AttackResult, ForwardPass
from molehunt.stress.attacks.constraint import Constraint, Exact, Free
from molehunt.stress.attacks.objective import Objective
from molehunt.stress.attacks.shortest import shortest_attack
from molehunt.stress.attacks.suffix import Suffix
from molehunt.stress.evaluation.norms import epsilon50, recovery_lengths

ROUNDED = 1e-3
"""Share of a row's length: a smaller part outside of the clamped span is rounding."""


@dataclass(frozen=True, eq=False, kw_only=True)
class AttackSetting:
    """One defence as an attacker meets it on some rows."""

    runs: ForwardPass
    objective: Objective
    constraint: Constraint
    moved: Callable[[Float[Tensor, "batch positions d_model"]], Float[Tensor, "batch pos d_model"]]
    """A perturbation → what it changes at the clamp's site, before the clamp."""


SettingOf = Callable[[SpanClamp], AttackSetting]
"""The clamp as it is in a round → what stands against the attack: the same rows each time."""
Utility = Callable[[SpanClamp], float]


def attack_setting(suffix: Suffix, objective: Objective, clamp: SpanClamp, at: Site | None = None) -> AttackSetting:
    """A model's rows under a clamp that `suffix` holds among its defences; of the threat model that follows from its sites.

    Args:
        suffix: made for this clamp: `suffix_of(model, prompts, entry, defence=[clamp])`. An entry at the clamp's own site
            is *after*, where the attacker is held to what is clamped. An earlier one is *upstream*, and free.
        objective: of these rows.
        clamp: in `suffix.defence`.
        at: where the clamp stands again, with `Again(clamp, at)` among the defences: the attacker is free then.
    """
    meets = clamp.site if at is None else at
    if meets == suffix.site:
        extra = None if clamp.directions is None else clamp.directions.mT
        held = Exact(clamp.dictionary, clamp.latents, extra)
        return AttackSetting(runs=suffix, objective=objective, constraint=held, moved=lambda delta: delta)
    return AttackSetting(
        runs=suffix, objective=objective, constraint=Free(), moved=lambda delta: displacement(suffix, meets, delta)
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Round:
    """A clamp, and what it takes to get round it on rows that it did not grow from."""

    clamp: SpanClamp
    lengths: Float[Tensor, " rows"]
    """‖δ‖ that recovered each row, in units of the median ‖h‖ where it enters; infinite where none did."""
    random: Float[Tensor, " rows"]
    """The same against as many random directions in place of the found ones."""
    utility: float

    @property
    def rank(self) -> int:
        """Directions beside the latents."""
        return 0 if self.clamp.directions is None else len(self.clamp.directions)

    @property
    def recovered(self) -> Interval:
        return proportion(int(self.lengths.isfinite().sum()), len(self.lengths))

    @property
    def epsilon50(self) -> Interval | None:
        """None where fewer than half of the rows come back."""
        return epsilon50(self.lengths)


def cutting_plane_clamps(
    clamp: SpanClamp,
    benign: Float[Tensor, "tokens d_model"],
    training: SettingOf,
    test: SettingOf,
    utility: Utility,
    *,
    rounds: int,
    add: int = 1,
    max_norm: float = 8.0,
    config: AttackConfig,
    levels: int = 8,
    seed: int = 0,
    track: Track = silent,
) -> list[Round]:
    """Attack, hold the leading directions of what was found at their benign mean, and attack again.

    The first round is the clamp as given. Ends early where no row it grows on comes back, or what brings them back lies
    in what is held already.

    Args:
        clamp: to begin with.
        benign: activations at its site (the `fit` split), for the means.
        training: rows whose perturbations directions are taken from.
        test: other rows, which every round is attacked on anew.
        utility: of a clamp, on whatever scale.
        rounds: of growth.
        add: directions a round.
        most: the largest perturbation, in units of the median ‖h‖ where it enters, under the first clamp.
        config: of each attack.
        levels: of each search for the shortest (see `shortest_attack`).
        seed: of the random directions.
        track: shown rounds.
    """
    rng = torch.Generator().manual_seed(seed)
    unit = float(test(clamp).runs.entering[:, 0].norm(dim=-1).median())
    control, done = clamp, list[Round]()

    def lengths(setting_of: SettingOf, held: SpanClamp) -> tuple[AttackResult, AttackSetting]:
        meets = setting_of(held)
        radius = torch.full((len(meets.runs.entering),), max_norm * unit, device=meets.runs.entering.device)
        return shortest_attack(meets.runs, meets.objective, meets.constraint, radius, config, levels=levels), meets

    def judged(held: SpanClamp) -> Tensor:
        found, _ = lengths(test, held)
        return recovery_lengths(found.norm / unit, found.recovered).cpu()

    for step in track(range(rounds + 1), "grown clamp", rounds + 1):
        own = judged(clamp)
        random = own if control is clamp else judged(control)
        done.append(Round(clamp=clamp, lengths=own, random=random, utility=utility(clamp)))
        if step == rounds:
            break
        found, meets = lengths(training, clamp)
        if not bool(found.recovered.any()):
            break
        more = _leading(clamp, meets.moved(found.delta)[found.recovered], add)
        if not len(more):
            break
        drawn = _outside(control, torch.randn(len(more), clamp.dictionary.d_in, generator=rng, dtype=torch.double))
        clamp = with_directions(clamp, more, benign)
        control = with_directions(control, torch.linalg.svd(drawn, full_matrices=False).Vh.float(), benign)
    return done


def with_directions(
    clamp: SpanClamp, directions: Float[Tensor, "k d_model"], benign: Float[Tensor, "tokens d_model"]
) -> SpanClamp:
    """The clamp that also holds these directions, at the mean of benign activations. Raises NotTestable without any."""
    if not len(benign):
        raise NotTestable("the mean of no benign token says nothing: give some activations of the clamp's site.")
    n, _, _ = clamp.dictionary.normalised(benign)
    mean = n.mean(0).cpu() @ directions.mT
    if clamp.directions is None or clamp.held is None:
        return replace(clamp, directions=directions, held=mean)
    return replace(clamp, directions=torch.cat([clamp.directions, directions]), held=torch.cat([clamp.held, mean]))


def _leading(clamp: SpanClamp, moved: Float[Tensor, "batch pos d_model"], add: int) -> Float[Tensor, "k d_model"]:
    """Right singular vectors of the part of each row outside of what is held, scaled to length 1; at most `add`."""
    rows = moved.double().cpu()
    free = _outside(clamp, rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
    size, whole = free.flatten(1).norm(dim=1), rows.flatten(1).norm(dim=1)
    kept = size > ROUNDED * whole
    units = free[kept] / size[kept][:, None, None]
    _, sizes, vectors = torch.linalg.svd(units.flatten(0, 1), full_matrices=False)
    return vectors[:add][sizes[:add] > ROUNDED * len(units) ** 0.5].float()


def _outside(clamp: SpanClamp, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    extra = None if clamp.directions is None else clamp.directions.mT
    Q = Exact(clamp.dictionary, clamp.latents, extra).basis(torch.device("cpu")).double()
    return rows - rows @ Q @ Q.mT
