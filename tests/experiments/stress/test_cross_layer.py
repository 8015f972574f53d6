"""Attacks on clamps at several layers: the exact arm holds them all, the published one does not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from experiments.stress.cross_layer import Layered, LayeredExact, LayeredPaper, layered, layered_drift
from molehunt.dictionary.dictionary import Dictionary
from molehunt.errors import UsageError
from molehunt.model.taps import edit_sites
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks.attack import AttackConfig, attack
from molehunt.stress.attacks.constraint import Constraint, Exact, Free
from molehunt.stress.attacks.objective import ChoiceMargin, TargetText
from molehunt.stress.attacks.perturbed_answers import perturbed_answers_at
from molehunt.stress.attacks.shortest import shortest_attack
from molehunt.stress.attacks.suffix import suffix_of
from random_dictionaries import dictionary_of
from tiny_models import D_MODEL, prompts, tiny_model, tiny_tokenizer

SITES = (Site(0), Site(1), Site(2))
LATENTS = torch.tensor([3, 8, 11])
ANSWERS = [[7, 9], [], [6, 4], [11, 12]]
GOAL = ChoiceMargin(torch.tensor([9, 20, 31, 42]), torch.tensor([[50, 51, 52]] * 4))
CONFIG = AttackConfig(steps=10, target_margin=torch.inf)


def clamps(dictionary: Dictionary, sites: tuple[Site, ...] = SITES) -> list[Clamp]:
    return [Clamp(site, dictionary, LATENTS, "set", 2.0) for site in sites]


def runs_of(
    family: str = "jumprelu", norm: str = "none", sites: tuple[Site, ...] = SITES, positions: int = 2
) -> Layered:
    made = replace(dictionary_of(family), norm=norm)
    suffix = suffix_of(tiny_model("llama"), prompts(), sites[0], defence=clamps(made, sites), answers=ANSWERS)
    return layered(suffix, dict.fromkeys(reversed(sites), Exact(made, LATENTS)), positions)


def noise(runs: Layered, seed: int = 0, size: float = 1.0) -> Tensor:
    shape = (len(runs.entering), runs.slots, D_MODEL)
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def balls(runs: Layered) -> Tensor:
    return runs.reference[0][:, 0].norm(dim=-1)


@pytest.mark.parametrize(
    ("family", "norm"), [("jumprelu", "none"), ("gated", "none"), ("relu", "layer_norm"), ("topk", "none")]
)
def test_the_exact_arm_holds_every_layer(family: str, norm: str) -> None:
    runs = runs_of(family, norm)
    radius = balls(runs)
    config = replace(CONFIG, positions=runs.slots)
    found = attack(runs, GOAL, LayeredExact(runs), radius, config)
    assert (found.norm <= radius * (1 + 1e-4)).all()
    assert (found.norm > 0.1 * radius).all()
    told = layered_drift(runs, found.delta)
    assert list(told.pre) == list(SITES)
    for site in SITES:
        assert float(told.perturbed[site].pre.max()) <= 1e-5
        assert float(told.pre[site][:, :2].max()) <= 1e-5  # each position, the anchor first
        assert float(told.norm[site].min()) > 0
    assert float(told.pre[SITES[2]][:, 2].max()) > 1e-3  # what is not held is told, too
    torch.testing.assert_close(torch.stack([*told.norm.values()]).norm(dim=0), found.norm)


def test_the_published_and_the_free_arm_drift() -> None:
    runs = runs_of()
    config = replace(CONFIG, positions=runs.slots)
    drift: dict[str, float] = {}
    arms: dict[str, Constraint] = {"free": Free(), "paper": LayeredPaper(runs), "no penalty": LayeredPaper(runs, 0.0)}
    for name, constraint in arms.items():
        found = attack(runs, GOAL, constraint, balls(runs), config)
        told = layered_drift(runs, found.delta)
        drift[name] = float(torch.stack([one.pre for one in told.perturbed.values()]).mean())
    assert 1e-3 < drift["paper"] < 0.5 * drift["free"]
    assert drift["paper"] < drift["no penalty"]


class _Slow:
    """h + δ, then + Q R⁻ᵀ(p_ref − p(h)), token by token in double; before it is told to attack, it looks."""

    def __init__(self, site: Site, made: Dictionary, anchor: int, deltas: Tensor) -> None:
        self.site, self.attacked = site, False
        self._made, self._anchor, self._deltas = made, anchor, deltas.double()
        self._defended = torch.empty(0)
        self.added: list[Tensor] = []

    def __call__(self, acts: Tensor) -> Tensor:
        if not self.attacked:
            self._defended = acts.clone()
            return acts
        A, acts = self._made.W_enc[:, LATENTS].double(), acts.clone()
        Q, R = torch.linalg.qr(A)
        for at, delta in enumerate(self._deltas, self._anchor):
            before = acts[:, at : at + 1].clone()
            pushed = before.double() + delta
            p_ref, p = (
                self._made.pre_activations(x.float(), LATENTS) for x in (self._defended[:, at : at + 1], pushed)
            )
            pushed += Q @ torch.linalg.solve(R.T, (p_ref - p)[0, 0].double())
            acts[:, at : at + 1] = pushed.float()
            self.added.append((pushed - before)[0, 0].float())
        return acts


def test_the_exact_arm_is_the_formula_on_full_passes() -> None:
    runs, raw = runs_of(), noise(runs_of(), size=0.5)
    added = runs.by_site(LayeredExact(runs)(raw, runs.entering[:, : runs.slots]))
    pushed = runs.entering.clone()
    pushed[:, : runs.slots] += torch.cat([*added.values()], 1)
    logits = runs(pushed)
    wanted = runs.by_site(raw)
    made = dictionary_of("jumprelu")
    for i, (prompt, answer) in enumerate(zip(prompts(), ANSWERS, strict=True)):
        row, anchor, n = [*prompt, *answer], len(prompt) - 1, min(2, 1 + len(answer))
        edits = [_Slow(site, made, anchor, wanted[site][i, :n]) for site in SITES]
        for attacked in (False, True):
            for slow in edits:
                slow.attacked = attacked
            with torch.no_grad(), edit_sites(runs.suffix.model, [*clamps(made), *edits]):
                full = runs.suffix.model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        for site, slow in zip(SITES, edits, strict=True):
            torch.testing.assert_close(added[site][i, :n], torch.stack(slow.added), rtol=1e-3, atol=1e-4)
            assert not added[site][i, n:].any()  # padding
        torch.testing.assert_close(logits[i, : len(answer) + 1], full[anchor:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "norm"), [("jumprelu", "none"), ("relu", "layer_norm")])
def test_nothing_changes_nothing(family: str, norm: str) -> None:
    runs = runs_of(family, norm)
    torch.testing.assert_close(runs(runs.entering), runs.suffix(runs.suffix.entering), rtol=0, atol=0)
    raw = torch.zeros_like(noise(runs)).requires_grad_()
    held = LayeredExact(runs)
    delta = held(raw, runs.entering[:, : runs.slots])
    assert float(delta.detach().abs().max()) == 0
    pushed = runs.entering.clone()
    pushed[:, : runs.slots] += delta
    (slope,) = torch.autograd.grad(GOAL(runs(pushed)).loss.sum(), raw)
    for part in runs.by_site(slope).values():  # and the attack is not stuck there
        assert (part.flatten(1).norm(dim=1) > 0).all()
    told = layered_drift(runs, torch.zeros_like(delta))
    assert all(float(one.max()) == 0 for one in told.pre.values())
    for constraint in (Free(), held, LayeredPaper(runs)):
        found = attack(runs, GOAL, constraint, torch.full((4,), 1e-6), replace(CONFIG, steps=1, positions=runs.slots))
        before = GOAL(runs(runs.entering)).margin
        torch.testing.assert_close(found.margin, before, rtol=1e-3, atol=1e-3)
        assert (found.recovered == (before > 0)).all()


def test_one_layer_is_the_attack_on_one_layer() -> None:
    runs = runs_of(sites=(Site(1),))
    config = replace(CONFIG, steps=10, positions=2)
    over = attack(runs, GOAL, LayeredExact(runs), balls(runs), config)
    own = attack(runs.suffix, GOAL, runs.held[Site(1)], balls(runs), config)
    torch.testing.assert_close(over.delta, own.delta, rtol=1e-4, atol=1e-5)


def test_rows_do_not_know_of_each_other() -> None:
    runs = runs_of()
    radius = balls(runs) * torch.tensor([4.0, 0.1, 2.0, 0.05])
    config = replace(CONFIG, steps=12, target_margin=0.3, positions=runs.slots)
    whole = attack(runs, GOAL, LayeredExact(runs), radius, config)
    assert len(set(whole.recovered.tolist())) == 2  # rows leave while others go on
    for i in range(4):
        row = torch.tensor([i])
        some = runs.rows(row)
        alone = attack(some, GOAL.rows(row), LayeredExact(some), radius[row], config)
        torch.testing.assert_close(alone.delta[0], whole.delta[i], rtol=2e-3, atol=2e-3)


def test_rows_do_not_know_of_each_other_in_the_sketch() -> None:
    runs = runs_of()
    raw, slope = noise(runs, size=0.3), noise(runs, 1)

    def gradient(held: LayeredPaper, kept: Tensor) -> Tensor:
        held(raw[kept], held.runs.entering[:, : runs.slots])
        return held.gradient(slope[kept])

    kept = torch.tensor([3, 1])
    whole = gradient(LayeredPaper(runs), torch.arange(4))
    torch.testing.assert_close(gradient(LayeredPaper(runs).rows(kept), kept), whole[kept], rtol=1e-3, atol=1e-3)
    left, kept = LayeredPaper(runs), torch.arange(4)
    assert not torch.allclose(gradient(left, kept), gradient(left, kept))  # probes are drawn anew


def test_the_shortest_attack_holds_every_layer() -> None:
    runs = runs_of()
    config = AttackConfig(steps=10, target_margin=0.0, positions=runs.slots)
    most = balls(runs) * torch.tensor([4.0, 4.0, 4.0, 0.01])
    found = shortest_attack(runs, GOAL, LayeredExact(runs), most, config, levels=2)
    assert found.recovered.tolist()[3] is False
    assert found.recovered.sum() >= 2
    assert (found.norm[found.recovered] < 0.8 * most[found.recovered]).all()
    assert all(float(one.pre.max()) <= 1e-5 for one in layered_drift(runs, found.delta).perturbed.values())


def test_the_sketch_takes_out_the_jacobian_where_it_is_large_enough() -> None:
    runs = runs_of(sites=SITES[:2], positions=1)  # 2 sites of 3 latents: fewer rows than probes
    raw, slope = noise(runs, size=0.3), noise(runs, 1)
    before = torch.cat([runs.held[s].dictionary.pre_activations(x[:, 0], LATENTS) for s, x in zip(SITES, runs.reference, strict=False)], 1)  # fmt: skip

    def watched(delta: Tensor) -> Tensor:
        states = runs.states(delta)
        return torch.cat([runs.held[s].dictionary.pre_activations(x[:, 0], LATENTS) for s, x in states.items()], 1)

    delta = raw.clone().requires_grad_()
    now = watched(delta)
    jacobian = torch.stack([torch.autograd.grad(one.sum(), delta, retain_graph=True)[0] for one in now.T], 1).flatten(2)

    def along(direction: Tensor) -> Tensor:
        return (jacobian @ direction.flatten(1)[..., None]).flatten(1).norm(dim=1)

    held = LayeredPaper(runs, weight=0.0)
    held(raw, runs.entering[:, : runs.slots])
    projected = held.gradient(slope)
    assert (along(projected) < 0.05 * along(slope)).all()  # a ridge leaves a little
    assert (projected.flatten(1).norm(dim=1) > 0.5 * slope.flatten(1).norm(dim=1)).all()
    weighed = LayeredPaper(runs, weight=7.0)
    weighed(raw, runs.entering[:, : runs.slots])
    drift = ((now - before).square().sum(1) / before.square().sum(1)).sum()
    (pull,) = torch.autograd.grad(7.0 * drift, delta)
    torch.testing.assert_close(weighed.gradient(slope) - projected, pull, rtol=1e-2, atol=1e-3)


def test_competing_latents_fire_as_they_did_at_every_layer() -> None:
    runs = runs_of("topk")
    held = LayeredExact(runs)
    seen = set[bool]()
    for seed, size in (
        (0, 0.2),
        (1, 0.2),
        (2, 0.2),
        (3, 0.2),
        (17, 0.5),
    ):  # in the last, padding alone crosses in a row
        delta = held(noise(runs, seed, size), runs.entering[:, : runs.slots])
        pushed = runs.entering.clone()
        pushed[:, : runs.slots] += delta
        violation = held.violation(pushed, runs.entering) > 0
        changed = torch.zeros(4, dtype=torch.bool)
        for (site, state), before in zip(runs.states(delta).items(), runs.reference, strict=True):
            fires = [runs.held[site].dictionary.encode_latents(x[:, :2], LATENTS) > 0 for x in (before, state)]
            changed |= ((fires[0] != fires[1]).any(-1) & runs.real).any(1)
        assert (violation == changed).all()
        seen |= set(changed.tolist())
    assert seen == {True, False}


def test_an_attack_at_several_layers_changes_cached_generation() -> None:
    model, made, rows, answers = tiny_model("llama"), dictionary_of("jumprelu"), prompts(), [[40, 41]] * 4
    defence = clamps(made, SITES[:2])
    suffix = suffix_of(model, rows, Site(0), defence=defence, answers=answers)
    runs = layered(suffix, dict.fromkeys(SITES[:2], Exact(made, LATENTS)), 2)
    config = AttackConfig(steps=60, lr=0.1, positions=runs.slots)
    found = attack(runs, TargetText.of(answers), LayeredExact(runs), 20 * balls(runs), config)
    assert found.recovered.any()
    told = perturbed_answers_at(
        model, tiny_tokenizer(), rows, runs.by_site(found.delta), defence=defence, max_new_tokens=2
    )
    assert [one[:2] == [40, 41] for one in told] == found.recovered.tolist()
    with pytest.raises(UsageError, match="equal"):
        perturbed_answers_at(model, tiny_tokenizer(), rows[:1] * 4, runs.by_site(found.delta), max_new_tokens=2)


def test_what_cannot_be_attacked() -> None:
    runs = runs_of()
    held = Exact(dictionary_of("relu"), LATENTS)
    for sites, wrong in (
        ({}, "clamped sites are none"),
        ({Site(1): held}, "enter it at the lowest"),
        ({Site(0): held, Site(1, "mlp"): held}, "L1.mlp is none"),
        ({Site(0): Exact(replace(held.dictionary, site=Site(2)), LATENTS)}, "is of L2.resid"),
    ):
        with pytest.raises(UsageError, match=wrong):
            layered(runs.suffix, sites)
    for positions in (0, 4):
        with pytest.raises(UsageError, match=f"{positions} positions cannot"):
            layered(runs.suffix, runs.held, positions)
    with pytest.raises(UsageError, match="has 6 slots"):
        attack(runs, GOAL, LayeredExact(runs), balls(runs), CONFIG)
