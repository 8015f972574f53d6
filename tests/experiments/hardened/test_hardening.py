"""Hardened defences against attackers who know them."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from experiments.hardened.benign_null import BenignNull
from experiments.hardened.cutting_plane_clamp import (
    AttackSetting,
    attack_setting,
    cutting_plane_clamps,
    with_directions,
)
from experiments.hardened.error_monitor import ErrorMonitor, Observed, Unflagged, Unobserved
from experiments.hardened.threat import Again, displacement, logits_and_acts
from molehunt.contracts import Detector, Gate, Intervention, Reading
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import ReLUActivation
from molehunt.errors import NotTestable, UsageError
from molehunt.measure.interval import proportion
from molehunt.model.generate import generate
from molehunt.model.taps import edit_sites, read_sites
from molehunt.site import Site
from molehunt.steer.error_shrink import ErrorShrink
from molehunt.steer.replace import Replace
from molehunt.steer.span_clamp import SpanClamp
from molehunt.stress.attacks.attack import PENALTY, AttackConfig, PooledActivations, attack
from molehunt.stress.attacks.constraint import Constraint, Exact, Free
from molehunt.stress.attacks.objective import ChoiceMargin, LinearReadout, ObjectiveValue
from molehunt.stress.attacks.suffix import Suffix, suffix_of
from molehunt.traffic.split import Calibrate, Fit
from random_dictionaries import dictionary_of
from tiny_models import D_MODEL as D
from tiny_models import prompts, tiny_model, tiny_tokenizer

SITE = Site(1)
LATENTS = torch.tensor([3, 8, 11])
CONFIG = AttackConfig(steps=60, lr=0.1, target_margin=0.0)
WANTED = ChoiceMargin(torch.tensor([9, 20, 31, 42]), torch.tensor([[50, 51, 52]] * 4))


def benign(n: int, seed: int) -> Tensor:
    """Tokens in a plane of 12 dimensions, and a little noise."""
    plane = torch.randn(12, D, generator=torch.Generator().manual_seed(5))
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=rng) @ plane / 3 + 0.05 * torch.randn(n, D, generator=rng)


def texts(n: int, seed: int) -> tuple[Tensor, ...]:
    return benign(20 * n, seed).split(20)


def monitor(fpr: float = 0.05) -> ErrorMonitor:
    return ErrorMonitor.fit(SITE, dictionary_of("relu"), Fit(texts(40, 0)), Calibrate(texts(200, 100)), fpr=fpr)


# the monitor


def test_the_monitor_flags_benign_tokens_at_its_rate_and_pushed_ones_above_it() -> None:
    found = monitor()
    assert isinstance(found, Detector) and isinstance(found, Gate)
    fresh = benign(2000, 2)[None]
    flagged = found(fresh)
    rate = proportion(int(flagged.sum()), 2000)
    assert rate.low <= 0.05 <= rate.high
    reading = Reading(
        tokens=torch.zeros(1, 2000, dtype=torch.long),
        mask=torch.ones(1, 2000, dtype=torch.bool),
        decision=torch.zeros(1, dtype=torch.long),
        tuned={SITE: fresh},
    )
    assert torch.equal(found.score(reading) > found.threshold, flagged)
    noise = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(3))
    assert float(found(fresh + 2 * noise).float().mean()) > 0.8


def test_it_predicts_the_norm_of_the_error() -> None:
    found, fresh = monitor(), benign(2000, 2)
    error = (fresh - found.dictionary.reconstruct(fresh)).norm(dim=-1)
    z = found.z(fresh[None])[0]
    torch.testing.assert_close(z * found.spread + found.predicted(fresh)[:, 0], error, rtol=1e-4, atol=1e-4)
    assert float(z.std()) == pytest.approx(1, abs=0.1)
    assert float((error - error.mean()).square().mean()) > 1.2 * found.spread**2  # the ridge explains some


def test_an_attacker_who_knows_the_threshold_stays_under_it() -> None:
    found = monitor()
    acts = benign(400, 7)
    acts = acts[~found(acts[None])[0]][:8, None]
    readout = LinearReadout(torch.randn(D, generator=torch.Generator().manual_seed(1)), -40.0)
    radius = torch.full((8,), 20.0)
    free, known = (
        attack(PooledActivations(acts), readout, held, radius, CONFIG) for held in (Free(), Unflagged(found, Free()))
    )
    assert free.recovered.all()
    assert found(acts + free.delta).all()
    assert known.recovered.all()  # a linear readout is not stopped by one threshold
    assert not found(acts + known.delta)[known.recovered].any()
    both = Unflagged(found, Exact(found.dictionary, LATENTS))
    held = attack(PooledActivations(acts), readout, both, radius, CONFIG)
    before, after = (found.dictionary.pre_activations(x, LATENTS) for x in (acts, acts + held.delta))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_tokens_that_the_attacker_does_not_touch_are_not_held_against_it() -> None:
    found = monitor()
    acts = torch.cat([benign(1, 7), 50 * torch.ones(1, D)])[None]  # the second is padding, say
    constraint = Unflagged(found, Free())
    assert float(constraint.violation(acts, acts)) == 0
    moved = acts.clone()
    moved[:, 0] += 20
    over = float(found.z(moved)[0, 0]) - found.threshold
    assert over > 0
    assert float(constraint.violation(moved, acts)) == pytest.approx(over)


def model_monitor() -> ErrorMonitor:
    """Of a tiny model's own activations."""
    model, site = tiny_model("llama"), SITE
    rows = torch.tensor(prompts(seed=3, lengths=(17,) * 40))
    with torch.no_grad(), read_sites(model, [site]) as tap:
        model(rows)
    acts = tuple(tap[site])
    return ErrorMonitor.fit(site, dictionary_of("jumprelu"), Fit(acts[:20]), Calibrate(acts[20:]), fpr=0.05)


def test_upstream_the_threshold_is_part_of_the_attack() -> None:
    found, suffix = model_monitor(), suffix_of(tiny_model("llama"), prompts(), Site(0))

    def flagged(entering: Tensor) -> Tensor:
        return found(logits_and_acts(suffix, found.site, entering)[1])[:, 0]

    kept = (~flagged(suffix.entering)).nonzero()[:, 0]  # the others are false positives
    assert len(kept) >= 2
    suffix, wanted = suffix.rows(kept), WANTED.rows(kept)
    radius, config = 3 * suffix.entering[:, 0].norm(dim=-1), replace(CONFIG, steps=30)
    free = attack(suffix, wanted, Free(), radius, config)
    known = attack(Observed(suffix, found), Unobserved(wanted), Free(), radius, config)
    assert free.recovered.all() and known.recovered.any()
    assert flagged(suffix.entering + free.delta).any()
    assert not flagged(suffix.entering + known.delta)[known.recovered].any()
    assert (wanted(suffix(suffix.entering + known.delta)).margin > 0)[known.recovered].all()
    closed = Observed(suffix, replace(found, threshold=-100.0))  # nobody gets under it
    assert not attack(closed, Unobserved(wanted), Free(), radius, replace(config, steps=3)).recovered.any()
    with pytest.raises(UsageError, match="lies below"):
        Observed(suffix_of(tiny_model("llama"), prompts(), Site(2)), found)(suffix.entering)


def test_what_is_seen_costs_and_what_is_not_is_free() -> None:
    logits = torch.randn(4, 2, 96, generator=torch.Generator().manual_seed(0))
    over = torch.tensor([[-1.0, -2.0], [0.0, -3.0], [0.5, -1.0], [-4.0, 2.0]])
    own, seen = WANTED(logits), Unobserved(WANTED)(torch.cat([logits, over[..., None]], -1))
    most = torch.tensor([0.0, 0.0, 0.5, 2.0])
    torch.testing.assert_close(seen.loss, own.loss + PENALTY * most)
    torch.testing.assert_close(seen.margin, torch.where(most > 0, -most, own.margin))


def test_live_it_blanks_the_tokens_that_it_flags() -> None:
    model, rows = tiny_model("llama"), prompts()
    blank = torch.zeros(1, 1, D)

    def answers(gate: ErrorMonitor) -> list[list[int]]:
        edits = [Replace(gate.site, blank, gate=gate)]
        return generate(model, tiny_tokenizer(), rows, max_new_tokens=4, interventions=edits, stop=())

    own = generate(model, tiny_tokenizer(), rows, max_new_tokens=4, stop=())
    found = model_monitor()
    assert answers(replace(found, threshold=1e6)) == own
    assert answers(replace(found, threshold=-1e6)) != own


def test_a_monitor_that_cannot_be_fitted() -> None:
    dictionary, few = dictionary_of("relu"), texts(2, 0)
    with pytest.raises(NotTestable, match="two benign texts or more, got 1"):
        ErrorMonitor.fit(SITE, dictionary, Fit(few[:1]), Calibrate(few), fpr=0.1)
    with pytest.raises(NotTestable, match="too few"):
        ErrorMonitor.fit(SITE, dictionary, Fit(few), Calibrate(few), fpr=0.1)
    with pytest.raises(NotTestable, match="40 clean rows cannot hold"):
        ErrorMonitor.fit(SITE, dictionary, Fit(texts(40, 0)), Calibrate(few), fpr=0.001)


# the grown clamp

GROWN = replace(CONFIG, optimiser="gradient", steps=15)
ROWS = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(6))).Q.T
BOTTLENECK, REST = ROWS[:2], ROWS[2:]


@dataclass(frozen=True, eq=False)
class AnyWay:
    """The behaviour is back where one of some directions is far enough out."""

    directions: Tensor

    def __call__(self, out: Tensor) -> ObjectiveValue:
        ways = out[:, 0] @ self.directions.T
        return ObjectiveValue(loss=-ways.logsumexp(-1), margin=ways.amax(-1) - 4)

    def rows(self, kept: Tensor) -> "AnyWay":
        return self


def planted_clamp() -> SpanClamp:
    """Of latents that the behaviour does not pass."""
    columns = REST[:3].T.contiguous()
    dictionary = Dictionary(
        W_enc=columns, b_enc=torch.zeros(3), W_dec=columns.T, b_dec=torch.zeros(D), nonlinearity=ReLUActivation()
    )
    return SpanClamp(SITE, dictionary, torch.arange(3), 0.0)


@dataclass(frozen=True, eq=False)
class Upstream:
    """A perturbation before the clamp, which then acts."""

    entering: Tensor
    clamp: SpanClamp

    def __call__(self, entering: Tensor) -> Tensor:
        return self.clamp(entering)

    def rows(self, kept: Tensor) -> "Upstream":
        return Upstream(self.entering[kept], self.clamp)


def planted(seed: int, threat: str, ways: Tensor = BOTTLENECK):
    acts = torch.randn(8, 1, D, generator=torch.Generator().manual_seed(seed))

    def setting_of(clamp: SpanClamp) -> AttackSetting:
        extra = None if clamp.directions is None else clamp.directions.mT
        held: Constraint = Free() if threat == "upstream" else Exact(clamp.dictionary, clamp.latents, extra)
        runs = Upstream(acts, clamp) if threat == "upstream" else PooledActivations(clamp(acts))
        carried = 5 * REST[0] if threat == "upstream" else torch.zeros(D)  # into what is held: nothing to learn there
        return AttackSetting(runs=runs, objective=AnyWay(ways), constraint=held, moved=lambda delta: delta + carried)

    return setting_of


@pytest.mark.parametrize("threat", ["after", "upstream"])
def test_a_bottleneck_of_two_directions_takes_two_rounds(threat: str) -> None:
    rounds = cutting_plane_clamps(
        planted_clamp(),
        torch.randn(500, D, generator=torch.Generator().manual_seed(8)),
        planted(1, threat),
        planted(2, threat),
        lambda clamp: float(D - 3 - (0 if clamp.directions is None else len(clamp.directions))),
        rounds=4,
        config=GROWN,
        levels=3,
    )
    assert [one.rank for one in rounds] == [0, 1, 2]  # and then nothing comes back, so that nothing is learnt
    assert [one.utility for one in rounds] == [29.0, 28.0, 27.0]
    assert rounds[0].lengths.isfinite().all() and rounds[1].lengths.isfinite().all()
    assert rounds[0].lengths.equal(rounds[0].random)
    assert rounds[0].epsilon50 is not None and rounds[2].epsilon50 is None
    assert rounds[1].lengths.median() > 1.05 * rounds[0].lengths.median()
    assert rounds[2].recovered.estimate == 0
    assert rounds[2].random.isfinite().all()  # two random directions stop nothing
    assert rounds[2].random.median() < 1.2 * rounds[0].lengths.median()
    grown = rounds[2].clamp.directions
    torch.testing.assert_close(grown.T @ grown, BOTTLENECK.T @ BOTTLENECK, rtol=0, atol=0.02)


def test_several_directions_a_round() -> None:
    rounds = cutting_plane_clamps(
        planted_clamp(),
        torch.randn(50, D, generator=torch.Generator().manual_seed(8)),
        planted(1, "after"),
        planted(2, "after"),
        lambda clamp: 0.0,
        rounds=1,
        add=2,
        config=GROWN,
        levels=2,
    )
    assert [one.rank for one in rounds] == [0, 2]
    assert rounds[1].recovered.estimate == 0


def test_directions_come_from_the_rows_it_grows_on_and_the_others_judge() -> None:
    rounds = cutting_plane_clamps(
        planted_clamp(),
        torch.randn(50, D, generator=torch.Generator().manual_seed(8)),
        planted(1, "after", BOTTLENECK[:1]),
        planted(2, "after"),
        lambda clamp: 0.0,
        rounds=3,
        config=GROWN,
        levels=1,
    )
    assert [one.rank for one in rounds] == [0, 1]  # they know one way, and it is closed
    grown = rounds[1].clamp.directions[0]
    assert abs(float(grown @ BOTTLENECK[0])) == pytest.approx(1, abs=1e-3)
    assert rounds[1].recovered.estimate == 1  # the other way is open


def test_directions_are_held_at_their_benign_mean() -> None:
    clamp, acts = planted_clamp(), benign(300, 1) + 0.7
    once = with_directions(clamp, BOTTLENECK[:1], acts)
    twice = with_directions(once, BOTTLENECK[1:], acts)
    edited = twice(5 * benign(40, 2)[None])
    expected = (acts.mean(0) @ BOTTLENECK.T).expand(1, 40, 2)
    torch.testing.assert_close(edited @ BOTTLENECK.T, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotTestable, match="no benign token"):
        with_directions(clamp, BOTTLENECK, acts[:0])


def on_model(threat: str) -> tuple[SpanClamp, Suffix, AttackSetting]:
    """A clamp on a tiny model, met in one of three ways."""
    model, clamp = tiny_model("llama"), SpanClamp(SITE, dictionary_of("jumprelu"), LATENTS, -0.5)
    clamp = with_directions(clamp, torch.eye(D)[:2], torch.randn(20, D, generator=torch.Generator().manual_seed(2)))
    at = Site(2) if threat == "again" else None
    defence = [clamp] if at is None else [clamp, Again(clamp, at)]
    suffix = suffix_of(model, prompts(), Site(0) if threat == "upstream" else SITE, defence=defence)
    return clamp, suffix, attack_setting(suffix, WANTED, clamp, at)


@pytest.mark.parametrize("threat", ["after", "upstream", "again"])
def test_a_model_is_met_as_the_sites_say(threat: str) -> None:
    clamp, suffix, meets = on_model(threat)
    radius = 2 * suffix.entering[:, 0].norm(dim=-1)
    found = attack(
        suffix, meets.objective, meets.constraint, radius, replace(CONFIG, steps=20, target_margin=torch.inf)
    )
    assert (found.norm > 0).all()
    moved = meets.moved(found.delta)
    held = torch.cat([clamp.dictionary.W_enc[:, LATENTS], clamp.directions.T], 1)
    share = float((moved @ torch.linalg.qr(held).Q).norm() / moved.norm())
    if threat == "after":
        assert moved is found.delta and share < 1e-5  # held to what is clamped
        return
    assert isinstance(meets.constraint, Free) and share > 0.05
    later = clamp.site if threat == "upstream" else Site(2)
    perturbed = suffix.entering + found.delta  # the prompts alone: one position
    with edit_sites(suffix.model, [Probe(later, seen := [])]):
        suffix(perturbed)
    torch.testing.assert_close(seen[0] - displaced_from(suffix, later), moved, rtol=1e-4, atol=1e-4)
    defended = clamp(seen[0])
    pre = clamp.dictionary.pre_activations(defended, LATENTS)
    torch.testing.assert_close(pre, torch.full_like(pre, -0.5), rtol=1e-4, atol=1e-4)  # whatever was put in upstream


@dataclass(frozen=True)
class Probe:
    """Looks and changes nothing; entered first, it sees what the defence is given."""

    site: Site
    seen: list

    def __call__(self, acts: Tensor) -> Tensor:
        self.seen.append(acts.detach())
        return acts


def displaced_from(suffix: Suffix, site: Site) -> Tensor:
    with torch.no_grad():
        return logits_and_acts(suffix, site, suffix.entering)[1]


def test_padding_is_not_displaced_and_not_observed() -> None:
    suffix = suffix_of(tiny_model("llama"), prompts(), Site(0), answers=[[5, 6], [7], [], [8, 9]])
    delta = torch.randn(4, 3, D, generator=torch.Generator().manual_seed(0))
    moved = displacement(suffix, Site(2), delta)
    assert ((moved != 0).any(-1) == suffix.answered).all()
    never = replace(model_monitor(), threshold=-100.0)
    over = Observed(suffix, never)(suffix.entering)[..., -1]
    assert ((over != 0) == suffix.answered).all()


# the correction that benign activations do not feel


@pytest.mark.parametrize("kind", ["span", "shrink"])
def test_benign_activations_are_left_alone_and_others_are_not(kind: str) -> None:
    plane = torch.randn(12, D, generator=torch.Generator().manual_seed(5))
    coefficients = torch.randn(2, 200, 12, generator=torch.Generator().manual_seed(1))
    seen, fresh = (1 + coefficients @ plane / 3).unbind()
    dictionary = dictionary_of("relu")
    edit: Intervention = SpanClamp(SITE, dictionary, LATENTS, -1.0) if kind == "span" else ErrorShrink(SITE, dictionary)
    projected = BenignNull.fit(edit, seen)
    assert isinstance(projected, Intervention) and projected.protected.shape == (12, D)
    assert float((edit(fresh[None]) - fresh).norm(dim=-1).min()) > 0.1
    torch.testing.assert_close(projected(fresh[None])[0], fresh, rtol=0, atol=1e-3)
    perturbed = fresh + 2 * torch.randn(D, generator=torch.Generator().manual_seed(4))
    moved = (projected(perturbed[None]) - perturbed).norm(dim=-1)
    assert float(moved.min()) > 0.1
    if kind == "span":  # linear: what the perturbation adds to what the latents read is gone
        pre = [
            dictionary.pre_activations(x, LATENTS)
            for x in (projected(perturbed[None])[0], _on_plane(projected, perturbed))
        ]
        torch.testing.assert_close(pre[0], pre[1], rtol=1e-4, atol=1e-4)


def _on_plane(projected: BenignNull, acts: Tensor) -> Tensor:
    rows = projected.protected
    return projected.mean + (acts - projected.mean) @ rows.T @ rows


def test_the_share_that_is_left_free() -> None:
    clamp = SpanClamp(SITE, dictionary_of("relu"), LATENTS, -1.0)
    acts = benign(4000, 0)
    most, few = (BenignNull.fit(clamp, acts, left=left).protected for left in (0.01, 0.3))
    assert 12 <= len(most) < D and len(few) < len(most)
    scatter = (acts - acts.mean(0)).T @ (acts - acts.mean(0))
    for left, rows in ((0.01, most), (0.3, few)):
        kept = float((rows @ scatter @ rows.T).trace() / scatter.trace())
        assert 1 - left <= kept
    with pytest.raises(NotTestable, match=f"0 of {D} directions"):
        BenignNull.fit(clamp, acts, left=0.0)
    with pytest.raises(NotTestable, match=f"{D} benign tokens leave"):
        BenignNull.fit(clamp, acts[:D])
    with pytest.raises(UsageError, match="give the gate to"):
        BenignNull.fit(replace(clamp, gate=lambda x: x[..., 0] > 0), acts, left=0.02)


def test_it_acts_where_its_gate_says_and_strength_0_is_bit_equal() -> None:
    clamp, seen = SpanClamp(SITE, dictionary_of("relu"), LATENTS, -1.0), benign(400, 0)
    acts = torch.randn(2, 30, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert BenignNull.fit(replace(clamp, strength=0), seen, left=0.02)(acts) is acts

    def half(x: Tensor) -> Tensor:
        return x[..., 0] > 0

    plain, gated = (BenignNull.fit(clamp, seen, left=0.02, gate=gate)(acts) for gate in (None, half))
    where = half(acts)
    assert gated.dtype == acts.dtype
    assert gated[where].equal(plain[where]) and gated[~where].equal(acts[~where])


def test_an_attack_upstream_meets_every_defence_live() -> None:
    """Each hardened edit changes what the same perturbation does; none is bypassed."""
    model, site = tiny_model("llama"), SITE
    dictionary = dictionary_of("jumprelu")
    acts = torch.cat(texts(20, 0))
    clamp = SpanClamp(site, dictionary, LATENTS, -0.5)
    own = suffix_of(model, prompts(), Site(0))
    delta = torch.randn(4, 1, D, generator=torch.Generator().manual_seed(0))
    for edit in (clamp, ErrorShrink.fit(site, dictionary, acts, 4), BenignNull.fit(clamp, acts, left=0.02)):
        suffix = suffix_of(model, prompts(), Site(0), defence=[edit])
        entering = (suffix.entering + delta).requires_grad_()
        logits = suffix(entering)
        assert not torch.allclose(logits, own(entering), atol=1e-2)
        (slope,) = torch.autograd.grad(logits[:, 0, 5].sum(), entering)
        assert slope.isfinite().all() and float(slope.norm()) > 0
        radius = 3 * suffix.entering[:, 0].norm(dim=-1)
        assert attack(suffix, WANTED, Free(), radius, replace(CONFIG, steps=15)).recovered.any()
