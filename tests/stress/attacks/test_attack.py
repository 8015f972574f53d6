"""The attack finds what is known to be there: closed forms, bottlenecks, planted readouts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import ReLUActivation
from molehunt.model.generate import generate
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks.attack import AttackConfig, PooledActivations, attack
from molehunt.stress.attacks.constraint import Exact, Free, Paper, orthonormal
from molehunt.stress.attacks.objective import ChoiceMargin, LinearReadout, TargetText, least_norm
from molehunt.stress.attacks.perturbed_answers import perturbed_answers
from molehunt.stress.attacks.shortest import shortest_attack
from molehunt.stress.attacks.suffix import suffix_of
from random_dictionaries import dictionary_of
from tiny_models import D_MODEL as D
from tiny_models import prompts, tiny_model, tiny_tokenizer

CONFIG = AttackConfig(steps=80, lr=0.1, target_margin=0.0)
LATENTS = torch.tensor([3, 8, 11])


def dictionary(columns: Tensor) -> Dictionary:
    """A ReLU dictionary with these encoder columns."""
    n = columns.shape[1]
    return Dictionary(
        W_enc=columns, b_enc=torch.zeros(n), W_dec=columns.T, b_dec=torch.zeros(D), nonlinearity=ReLUActivation()
    )


def readout_case(rows: int = 6) -> tuple[PooledActivations, LinearReadout]:
    rng = torch.Generator().manual_seed(0)
    acts = torch.randn(rows, 1, D, generator=rng)
    readout = LinearReadout(torch.randn(D, generator=rng), -12.0)
    return PooledActivations(acts), readout


@pytest.mark.parametrize("constraint", [Free(), Exact(dictionary_of("relu"), LATENTS)], ids=["free", "exact"])
def test_a_linear_readout_is_reached_at_its_closed_form(constraint: Free | Exact) -> None:
    pooled, readout = readout_case()
    basis = constraint.basis(torch.device("cpu")) if isinstance(constraint, Exact) else None
    known = least_norm(readout, pooled.entering[:, 0], basis)
    found = shortest_attack(pooled, readout, constraint, 8 * known, replace(CONFIG, optimiser="gradient"))
    assert found.recovered.all()
    torch.testing.assert_close(found.norm, known, rtol=0.03, atol=0)
    assert (found.norm >= known * (1 - 1e-4)).all()  # nothing shorter exists
    short = attack(pooled, readout, constraint, 0.98 * known, CONFIG)
    assert not short.recovered.any()


def test_latents_that_the_behaviour_does_not_pass_cost_nothing() -> None:
    pooled, readout = readout_case()
    columns = torch.randn(D, 5, generator=torch.Generator().manual_seed(3))
    columns = columns - readout.weight[:, None] * (readout.weight @ columns) / readout.weight.square().sum()
    constraint = Exact(dictionary(columns), torch.arange(5))
    free = shortest_attack(pooled, readout, Free(), torch.full((6,), 50.0), CONFIG)
    under = shortest_attack(pooled, readout, constraint, torch.full((6,), 50.0), CONFIG)
    assert under.recovered.all()
    torch.testing.assert_close(under.norm, free.norm, rtol=0.1, atol=0)


def test_latents_that_hold_the_whole_bottleneck_are_never_passed() -> None:
    pooled, readout = readout_case()
    columns = torch.cat([torch.randn(D, 2, generator=torch.Generator().manual_seed(3)), readout.weight[:, None]], 1)
    constraint = Exact(
        dictionary(columns @ torch.randn(3, 3, generator=torch.Generator().manual_seed(4))), torch.arange(3)
    )
    found = attack(pooled, readout, constraint, torch.full((6,), 1e3), CONFIG)
    assert not found.recovered.any()
    assert least_norm(readout, pooled.entering[:, 0], constraint.basis(torch.device("cpu"))).isinf().all()


def test_the_published_arm_leaks_and_the_exact_one_does_not() -> None:
    model, made = tiny_model("llama"), dictionary_of("jumprelu")
    site = Site(0)
    suffix = suffix_of(model, prompts(), site, defence=[Clamp(site, made, LATENTS, "set", 2.0)])
    wanted = ChoiceMargin(torch.tensor([9, 20, 31, 42]), torch.tensor([[50, 51, 52]] * 4))
    radius = suffix.entering[:, 0].norm(dim=-1)
    basis = orthonormal(made.W_enc[:, LATENTS])
    drift: dict[str, float] = {}
    for constraint in (Free(), Paper(made, LATENTS), Exact(made, LATENTS)):
        found = attack(suffix, wanted, constraint, radius, replace(CONFIG, target_margin=torch.inf))
        assert (found.norm <= radius * (1 + 1e-4)).all()
        before, after = (
            made.pre_activations(x[:, :1], LATENTS) for x in (suffix.entering, suffix.entering[:, :1] + found.delta)
        )
        drift[constraint.name] = float((after - before).norm() / before.norm())
        share = float((found.delta.flatten(1) @ basis).norm() / found.delta.norm())
        assert (share > 0.05) == (constraint.name != "exact"), constraint.name
    assert drift["exact"] <= 1e-5
    assert drift["paper"] > 0.01


def test_a_found_perturbation_changes_cached_generation() -> None:
    model, site, rows = tiny_model("llama"), Site(1), prompts()
    own = generate(model, tiny_tokenizer(), rows, max_new_tokens=3, stop=())
    answers = [[40, 41], [42, 43], [44, 45], [46, 47]]
    suffix = suffix_of(model, rows, site, answers=answers)
    goal = TargetText.of(answers)
    before = attack(suffix, goal, Free(), torch.full((4,), 1e-6), replace(CONFIG, steps=1))
    assert not before.recovered.any()
    found = attack(
        suffix, goal, Free(), 30 * suffix.entering[:, 0].norm(dim=-1), AttackConfig(steps=400, lr=0.05, positions=2)
    )
    assert found.recovered.all()
    decoded = perturbed_answers(model, tiny_tokenizer(), rows, site, found.delta, max_new_tokens=3)
    assert [one[:2] for one in decoded] == answers
    assert own != decoded


@pytest.mark.parametrize("optimiser", ["adam", "gradient"])
def test_rows_do_not_know_of_each_other(optimiser: str) -> None:
    suffix = suffix_of(tiny_model("llama"), prompts(), Site(0))
    goal = ChoiceMargin(torch.tensor([9, 20, 31, 42]), torch.tensor([[50, 51]] * 4))
    radius = torch.tensor([8.0, 2.0, 30.0, 0.5])
    config = replace(CONFIG, steps=15, target_margin=1.0, optimiser=optimiser)
    whole = attack(suffix, goal, Free(), radius, config)
    assert len(set(whole.recovered.tolist())) == 2  # rows that are done leave, others go on
    for i in range(4):
        alone = attack(suffix.rows(torch.tensor([i])), goal.rows(torch.tensor([i])), Free(), radius[i : i + 1], config)
        torch.testing.assert_close(alone.delta[0], whole.delta[i], rtol=1e-3, atol=1e-3)


def test_competing_latents_fire_as_they_did() -> None:
    made, site = dictionary_of("topk"), Site(0)
    suffix = suffix_of(tiny_model("llama"), prompts(), site)
    acts = suffix.entering[:, :1]
    firing = made.encode(acts).sum((0, 1)).argsort(descending=True)[:3]
    constraint = Exact(made, firing)
    goal = ChoiceMargin(torch.tensor([9, 20, 31, 42]), torch.tensor([[50, 51]] * 4))
    found = attack(suffix, goal, constraint, acts.flatten(1).norm(dim=1), replace(CONFIG, target_margin=torch.inf))
    assert (found.violation == 0).all()
    before, after = (made.encode_latents(x, firing) for x in (acts, acts + found.delta))
    assert (before > 0).any()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert (found.norm > 0).any()


def test_a_restart_is_never_worse() -> None:
    suffix = suffix_of(tiny_model("llama"), prompts(), Site(0))
    goal = ChoiceMargin(torch.tensor([9, 20, 31, 42]), torch.tensor([[50, 51]] * 4))
    radius, config = torch.full((4,), 2.0), replace(CONFIG, steps=10, target_margin=torch.inf)
    once, thrice = (attack(suffix, goal, Free(), radius, replace(config, restarts=n)) for n in (1, 3))
    assert (thrice.margin >= once.margin).all()
    assert (thrice.margin > once.margin).any()


def test_a_radius_for_each_row() -> None:
    pooled, readout = readout_case(2)
    for radius in (torch.ones(3), torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="radius above 0"):
            attack(pooled, readout, Free(), radius)
