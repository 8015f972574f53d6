"""Edits behind the attacked site, grown against perturbations that know them."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from experiments.hardened.cutting_plane import (
    HalfSpaceGate,
    TrainingRows,
    cutting_plane_ablations,
    half_space_gate,
    with_leading,
)
from experiments.hardened.threat import displacement
from molehunt.contracts import Gate
from molehunt.errors import NotTestable
from molehunt.model.taps import edit_sites
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.stress.attacks.attack import PENALTY, AttackConfig, PooledActivations, attack
from molehunt.stress.attacks.constraint import Free
from molehunt.stress.attacks.objective import ObjectiveValue, TargetText
from molehunt.stress.attacks.shortest import shortest_attack
from molehunt.stress.attacks.suffix import suffix_of
from tiny_models import D_MODEL as D
from tiny_models import prompts, tiny_model

SITE, LATER = Site(0), Site(2)
ANSWERS = [[9], [20], [31], [42]]
CONFIG = AttackConfig(steps=25, target_margin=0.0)


@dataclass(frozen=True, eq=False)
class Reach:
    """Along two directions at once, one of which the half-space gate stands across; flagged is worse than nothing."""

    gate: HalfSpaceGate | None

    def __call__(self, out: Tensor) -> ObjectiveValue:
        way = out[:, 0, 1] - 1.5 + out[:, 0, 0].clamp(max=3)
        over = torch.zeros(len(out)) if self.gate is None else (self.gate.z(out)[:, 0]).relu()
        return ObjectiveValue(loss=PENALTY * over - way, margin=torch.where(over > 0, -over, way))

    def rows(self, kept: Tensor) -> "Reach":
        return self


def unit() -> float:
    return float(suffix_of(tiny_model("llama"), prompts(), SITE).entering[:, 0].norm(dim=-1).median())


def training(max_norm: float = 8.0) -> TrainingRows:
    rows = prompts()
    return TrainingRows(
        model=tiny_model("llama"),
        prompts=rows,
        answers=ANSWERS[: len(rows)],
        site=SITE,
        max_norm=max_norm * unit(),
        config=CONFIG,
        levels=2,
    )


def planted(seed: int, n: int, shift: float) -> tuple[Tensor, Tensor]:
    """Clean tokens, and perturbed ones that lie off along a direction in which clean ones hardly vary."""
    rng = torch.Generator().manual_seed(seed)
    scale = torch.ones(D)
    scale[0] = 0.1
    clean, perturbed = torch.randn(n, D, generator=rng) * scale, torch.randn(40, D, generator=rng) * scale
    perturbed[:, 0] += shift
    return clean, perturbed


# directions at later sites


def test_slopes_pass_through_edits_of_later_blocks() -> None:
    model, rows = tiny_model("llama"), prompts()
    directions = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    suffix = suffix_of(model, rows, SITE, defence=[Ablate(LATER, directions)], answers=ANSWERS[: len(rows)])
    goal = TargetText.of(ANSWERS[: len(rows)])
    entering = suffix.entering.clone().requires_grad_()
    loss = goal(suffix(entering)).loss.sum()
    (slope,) = torch.autograd.grad(loss, entering)
    along = torch.randn(slope.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ahead, behind = (goal(suffix(suffix.entering + step * along)).loss.sum() for step in (1e-2, -1e-2))
    torch.testing.assert_close((slope * along).sum(), (ahead - behind) / 2e-2, rtol=0.02, atol=1e-3)


def test_each_round_takes_out_what_the_last_pushes_moved() -> None:
    rows = training()
    centers = {LATER: torch.zeros(D)}
    rounds = cutting_plane_ablations(rows, (), centers, rounds=3, add=2)
    assert [len(one[0].directions) for one in rounds] == [2, 4, 6]
    last = rounds[-1][0].directions
    torch.testing.assert_close(last @ last.mT, torch.eye(6), rtol=0, atol=1e-5)
    first = rounds[0][0].directions  # each round keeps the ones before
    torch.testing.assert_close(first @ last.mT @ last, first, rtol=0, atol=1e-5)
    bare = suffix_of(rows.model, rows.prompts, SITE, answers=rows.answers)
    radius = torch.full((len(rows.prompts),), rows.max_norm)
    found = shortest_attack(bare, TargetText.of(ANSWERS[: len(rows.prompts)]), Free(), radius, CONFIG, levels=2)
    moved = displacement(bare, LATER, found.delta)[found.recovered, 0]
    held = (moved @ first.mT).norm(dim=1) / moved.norm(dim=1)
    assert float(held.square().mean()) > 3 * 2 / D  # more than two random directions would hold


def test_it_ends_where_nothing_comes_back() -> None:
    assert cutting_plane_ablations(training(max_norm=1e-4), (), {LATER: torch.zeros(D)}, rounds=2) == []


def test_leading_directions_are_of_what_is_not_held_yet() -> None:
    held = torch.eye(D)[:1]
    moved = torch.zeros(6, D)
    moved[:, 0], moved[:, 3] = torch.tensor([100.0, -100.0] * 3), 1.0  # what is held tells nothing of the rest
    moved[0, 7] = 0.01
    found = with_leading(held, moved, 1)
    assert found.shape == (2, D)
    torch.testing.assert_close(found.mT @ found, torch.diag(torch.eye(D)[[0, 3]].sum(0)), rtol=0, atol=0.01)
    torch.testing.assert_close(with_leading(None, moved, 1).abs()[0, 0], torch.tensor(1.0), rtol=0, atol=1e-3)


# the half-space gate


def test_a_fence_holds_every_clean_token_and_keeps_pushed_ones_out() -> None:
    clean, perturbed = planted(0, 2000, 2.0)
    found = half_space_gate(LATER, clean, perturbed)
    assert isinstance(found, Gate)
    assert not found(clean[None]).any()
    assert found(perturbed[None]).all()
    assert abs(float(found.directions[0, 0])) > 0.9  # not where the means differ most, where clean ones vary least
    fresh, _ = planted(1, 2000, 2.0)
    assert float(found(fresh[None]).float().mean()) < 0.005


def test_another_wall_keeps_what_the_first_held_out() -> None:
    clean, perturbed = planted(0, 2000, 2.0)
    other = clean[:40].clone()
    other[:, 5] += 8
    first = half_space_gate(LATER, clean, perturbed)
    both = first.narrowed(clean, other)
    assert len(both.bounds) == 2 and not first(other[None]).all()
    assert both(other[None]).all() and both(perturbed[None]).all() and not both(clean[None]).any()


def test_z_counts_clean_standard_deviations() -> None:
    one = HalfSpaceGate(LATER, torch.eye(D)[:2], torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0]))
    acts = torch.zeros(1, 3, D)
    acts[0, 0, 0], acts[0, 1, 1], acts[0, 2, 0] = 2.0, 10.0, 1.0
    torch.testing.assert_close(one.z(acts), torch.tensor([[2.0, 2.0, 0.0]]))
    assert one(acts).tolist() == [[True, True, False]]


def test_an_attacker_who_knows_the_fence_can_stay_inside() -> None:
    clean, perturbed = planted(0, 2000, 2.0)
    found = half_space_gate(LATER, clean, perturbed)
    acts = clean[:6, None]

    far = attack(PooledActivations(acts), Reach(None), Free(), torch.full((6,), 4.0), CONFIG)
    near = attack(PooledActivations(acts), Reach(found), Free(), torch.full((6,), 4.0), CONFIG)
    assert far.recovered.all() and found(acts + far.delta).any()
    assert near.recovered.any() and not found(acts + near.delta)[near.recovered].any()


def test_too_little_to_fence_with() -> None:
    clean, perturbed = planted(0, 2000, 2.0)
    with pytest.raises(NotTestable, match=f"got {D} and 40"):
        half_space_gate(LATER, clean[:D], perturbed)
    with pytest.raises(NotTestable, match="got 2000 and 0"):
        half_space_gate(LATER, clean, perturbed[:0])


def test_behind_the_fence_an_edit_leaves_clean_answers_alone() -> None:
    model, rows = tiny_model("llama"), torch.tensor(prompts(seed=3, lengths=(9,) * 4))
    directions = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    far = HalfSpaceGate(LATER, torch.eye(D)[:1], torch.tensor([1e6]), torch.tensor([1.0]))
    with torch.no_grad():
        own = model(rows).logits
        with edit_sites(model, [Ablate(LATER, directions, gate=far)]):
            assert torch.equal(model(rows).logits, own)
        near = HalfSpaceGate(LATER, torch.eye(D)[:1], torch.tensor([-1e6]), torch.tensor([1.0]))
        with edit_sites(model, [Ablate(LATER, directions, gate=near)]):
            assert not torch.equal(model(rows).logits, own)
