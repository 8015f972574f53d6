"""The parts of a perturbation are those that are known to be in it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from experiments.stress.attribution import attribute, components, geometry
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import ReLUActivation
from molehunt.errors import UsageError
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks.attack import AttackConfig, PooledActivations, attack
from molehunt.stress.attacks.constraint import Exact, Free
from molehunt.stress.attacks.objective import ChoiceMargin, LinearReadout
from molehunt.stress.attacks.suffix import suffix_of
from random_dictionaries import FAMILIES, INPUT_NORMS, D, F, dictionary_of, some_acts
from tiny_models import prompts, tiny_model

LATENTS = torch.tensor([17, 3, 8])
ATOMS, N = torch.eye(D), 12
"""The plain dictionary's latents are the first N axes; the other axes are beyond it."""
CLAMPED = torch.tensor([0, 1])


def plain() -> Dictionary:
    """Codes are the coordinates; every one fires at the acts of `known`."""
    return Dictionary(
        W_enc=ATOMS[:, :N], b_enc=torch.zeros(N), W_dec=ATOMS[:N], b_dec=torch.zeros(D), nonlinearity=ReLUActivation()
    )


def known(delta: Tensor) -> tuple[PooledActivations, LinearReadout, Tensor]:
    """Rows with all codes at 2, and a readout of latent 5 that asks for 1 more."""
    return PooledActivations(torch.full((3, 1, D), 2.0)), LinearReadout(ATOMS[5], -3.0), delta.expand(3, 1, D).clone()


def noise(seed: int = 0, size: float = 3.0) -> Tensor:
    return size * torch.randn(3, 7, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", INPUT_NORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_make_the_whole(family: str, norm: str) -> None:
    made, acts, delta = replace(dictionary_of(family), norm=norm), some_acts(), noise()
    parts = components(made, LATENTS, acts, delta, k=4)
    top = parts.pop("top")
    assert ("normalisation" in parts) == (norm != "none")
    torch.testing.assert_close(sum(parts.values()), delta, rtol=0, atol=1e-5)
    missed = delta - (made.reconstruct(acts + delta) - made.reconstruct(acts))
    torch.testing.assert_close(parts["residual"], missed, rtol=0, atol=1e-4)
    # a clamped latent writes what is gone from the reconstruction without it
    without = replace(made, W_dec=made.W_dec.index_fill(0, LATENTS, 0.0))
    theirs = made.decode(made.encode(acts + delta), acts + delta) - made.decode(made.encode(acts), acts)
    others = without.decode(made.encode(acts + delta), acts + delta) - without.decode(made.encode(acts), acts)
    torch.testing.assert_close(parts["clamped"], theirs - others, rtol=0, atol=1e-4)
    every = components(made, LATENTS, acts, delta, k=F)["top"]
    torch.testing.assert_close(every, parts["non-clamped"], rtol=0, atol=1e-4)
    assert not torch.allclose(top, every)


def test_the_latent_that_moved_most_is_the_top_one() -> None:
    made, acts, delta = dictionary_of("relu"), some_acts(), noise()
    top = components(made, LATENTS, acts, delta, k=1)["top"]
    for row in range(len(acts)):
        moved = made.encode(acts[row] + delta[row]) - made.encode(acts[row])
        free = [i for i in range(F) if i not in LATENTS.tolist()]
        most = max(free, key=lambda i: float(moved[:, i].square().sum()))
        torch.testing.assert_close(top[row], moved[:, most, None] * made.W_dec[most], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("delta", "part"),
    [(1.5 * ATOMS[5], "non-clamped"), (1.5 * ATOMS[N + 3], "residual"), (1.5 * ATOMS[1], "clamped")],
    ids=["a latent", "beyond the dictionary", "a clamped latent"],
)
def test_a_perturbation_of_one_kind_is_all_of_that_part(delta: Tensor, part: str) -> None:
    pooled, readout, deltas = known(delta)
    told = attribute(pooled, readout, deltas, plain(), CLAMPED, k=2)
    back = part == "non-clamped"
    for name, component in told.components.items():
        present = name == part or (back and name == "top")
        assert component.absent == (0 if present else 3), name
        length = torch.full((3,), 1.0 if present else 0.0)
        for replay in (component.alone, component.alone_at_norm):
            torch.testing.assert_close(replay.norm, length, rtol=0, atol=1e-6)
            assert replay.recovered.estimate == (present and back)
        for replay in (component.without, component.without_at_norm):
            torch.testing.assert_close(replay.norm, 1 - length, rtol=0, atol=1e-6)
            assert replay.recovered.estimate == (back and not present)
    assert told.whole.recovered.estimate == back
    assert not told.nothing.margin.gt(0).any()


def test_parts_are_replayed_at_their_own_norm_and_at_that_of_the_whole() -> None:
    pooled, readout, delta = known(1.2 * ATOMS[5] + 1.6 * ATOMS[N])  # of length 2
    told = attribute(pooled, readout, delta, plain(), CLAMPED)
    part = told.components["non-clamped"]
    expected = {"alone": (0.2, 0.6), "alone_at_norm": (1.0, 1.0), "without": (-1.0, 0.8), "without_at_norm": (-1.0, 1)}
    for name, (margin, norm) in expected.items():
        torch.testing.assert_close(getattr(part, name).margin, torch.full((3,), margin), rtol=0, atol=1e-5)
        torch.testing.assert_close(getattr(part, name).norm, torch.full((3,), float(norm)), rtol=0, atol=1e-5)
    rest = told.components["residual"]
    torch.testing.assert_close(rest.without_at_norm.margin, torch.full((3,), 1.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(rest.without.margin, told.whole.margin, rtol=0, atol=1e-5)
    assert rest.alone_at_norm.recovered.estimate == 0
    assert part.alone.recovered.high == 1
    assert part.alone.recovered.low == pytest.approx(0.025 ** (1 / 3))  # exact limits of 3 in 3


@pytest.mark.parametrize("norm", INPUT_NORMS)
def test_what_an_attack_found_on_a_model(norm: str) -> None:
    model, site = tiny_model("llama"), Site(0)
    made = replace(dictionary_of("jumprelu"), norm=norm)
    suffix = suffix_of(model, prompts(), site, defence=[Clamp(site, made, LATENTS, "set", 2.0)])
    goal = ChoiceMargin(torch.tensor([9, 20, 31, 42]), torch.tensor([[50, 51, 52]] * 4))
    radius = 2 * suffix.entering[:, 0].norm(dim=-1)
    held = attack(suffix, goal, Exact(made, LATENTS), radius, AttackConfig(steps=60))
    told = attribute(suffix, goal, held.delta, made, LATENTS)
    torch.testing.assert_close(told.whole.margin, held.margin, rtol=1e-4, atol=1e-4)
    assert (told.whole.margin > told.nothing.margin).all()
    for name, component in told.components.items():
        if name in ("clamped", "normalisation"):  # an exact attack moves no clamped code, and no norm
            assert component.absent == 4
            assert not component.alone_at_norm.norm.any()  # rounding is not lengthened
        else:
            for replay in (component.alone_at_norm, component.without_at_norm):
                torch.testing.assert_close(replay.norm, torch.ones(4), rtol=1e-4, atol=0)
            assert ((component.alone.norm - 1).abs() > 1e-3).all(), name
    free = attack(suffix, goal, Free(), radius, AttackConfig(steps=20, target_margin=torch.inf))
    assert attribute(suffix, goal, free.delta, made, LATENTS).components["clamped"].absent < 4


def test_directions_and_the_span() -> None:
    made, name = plain(), "refusal"
    delta = torch.stack([3 * ATOMS[:1], -2 * ATOMS[5:6], ATOMS[:1] + ATOMS[5:6]])
    told = geometry(delta, made, CLAMPED, {name: ATOMS[0], "other": ATOMS[5]})
    half = 0.5**0.5
    torch.testing.assert_close(told.cosines[name][:, 0], torch.tensor([1, 0, half]))
    torch.testing.assert_close(told.cosines["other"][:, 0], torch.tensor([0, -1, half]))
    torch.testing.assert_close(told.in_span, torch.tensor([1, 0, half]))


def test_how_alike_rows_are() -> None:
    made, one = plain(), torch.randn(1, 2, D, generator=torch.Generator().manual_seed(0))
    same = geometry(one * torch.arange(1.0, 6.0)[:, None, None], made, CLAMPED, {})
    torch.testing.assert_close(same.shares, torch.tensor([1.0, 0, 0, 0, 0]), rtol=0, atol=1e-6)
    assert same.effective_rank == pytest.approx(1, abs=1e-3)
    different = geometry(4 * ATOMS[:5, None], made, CLAMPED, {})
    torch.testing.assert_close(different.shares, torch.full((5,), 0.2))
    assert different.effective_rank == pytest.approx(5)
    for told in (same, different):
        assert told.chance.sum() == pytest.approx(1)
    assert 0.2 < different.chance[0] < same.chance[0] < 0.9  # rows of 1 to 5 times one length are alike by that


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"latents": torch.tensor([99])}, "no latent 99"),
        ({"delta": torch.zeros(3, 1, D)}, "3 rows are so"),
        ({"delta": torch.full((3, 1, D), torch.nan)}, "length nan"),
        ({"delta": torch.ones(3, 2, D)}, "and the activations"),
        ({"k": 0}, "k = 0"),
        ({"dictionary": Dictionary(W_enc=torch.eye(4), b_enc=torch.zeros(4), W_dec=torch.eye(4), b_dec=torch.zeros(4), nonlinearity=ReLUActivation())}, "reads 4 values"),
    ],
)  # fmt: skip
def test_what_has_no_parts(change: dict, wrong: str) -> None:
    pooled, readout, delta = known(ATOMS[0])
    given = {"delta": delta, "dictionary": plain(), "latents": CLAMPED, "k": 2, **change}
    with pytest.raises(UsageError, match=wrong):
        attribute(pooled, readout, given["delta"], given["dictionary"], given["latents"], k=given["k"])


@pytest.mark.parametrize("direction", [2 * ATOMS[0], torch.ones(1), torch.full((D,), torch.nan)])
def test_what_is_no_direction(direction: Tensor) -> None:
    with pytest.raises(UsageError, match="a direction has length 1"):
        geometry(torch.ones(2, 1, D), plain(), CLAMPED, {"refusal": direction})
    with pytest.raises(UsageError, match="reads 32 values"):
        geometry(torch.ones(2, 1, 5), plain(), CLAMPED, {})
