"""Random features: what plain ridge cannot follow, against least squares on the same features."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from molehunt.errors import InvalidInput, NotTestable
from molehunt.site import Site
from molehunt.transfer import random_features as module
from molehunt.transfer.collect import PairActs
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.random_features import RandomFeatureMap, random_features
from molehunt.transfer.ridge import ridge
from molehunt.transfer.saved import load_map


def bent(n: int, seed: int, *, noise: float = 0.05) -> PairActs:
    """A target that bends, far from 0, with dimensions of unlike scales and one that never varies."""
    rng, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
    first, second = torch.randn(4, 6, generator=fixed), torch.randn(6, 5, generator=fixed)
    scale = torch.tensor([0.1, 1.0, 5.0, 20.0])
    x = torch.randn(n, 4, generator=rng)
    y = torch.relu(x @ first + 0.3) @ second - 7 + noise * torch.randn(n, 5, generator=rng)
    x = torch.cat([x * scale + 30, torch.full((n, 1), 2.0)], 1)
    return PairActs(source_site=Site(1), target_site=Site(2), x=x, y=y, row=torch.arange(n) // 5)


def left(map, acts: PairActs) -> float:
    return float((map(acts.x) - acts.y).square().sum() / (acts.y - acts.y.mean(0)).square().sum())


def test_what_bends_is_followed_far_better_than_by_a_plain_ridge() -> None:
    fit, held_out, new = bent(3000, 0), bent(500, 1), bent(1000, 2)
    plain = left(ridge(fit.moments(), held_out.moments()), new)
    by_width = [left(random_features(fit, held_out, features=k), new) for k in (5, 20, 80, 300)]
    assert by_width == sorted(by_width, reverse=True)
    assert left(random_features(fit, held_out), new) == pytest.approx(by_width[1], abs=0), "4 for each dimension"
    assert by_width[2] < 0.3 * plain and by_width[3] < 0.1 * plain


def test_the_readout_is_least_squares_on_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, held_out = bent(2000, 0, noise=1.0), bent(500, 1, noise=1.0)
    fit, held_out = (replace(some, x=some.x[:, :4]) for some in (fit, held_out))
    monkeypatch.setattr(module, "CHUNK", 300)
    map = random_features(fit, held_out, features=10)
    x = fit.x.double()
    features = torch.relu(x @ map.projection.double() + map.offset.double())
    stacked = np.concatenate([x.numpy(), features.numpy(), np.ones((2000, 1))], 1)
    readout = torch.from_numpy(np.linalg.lstsq(stacked, fit.y.double().numpy(), rcond=None)[0])
    new = bent(100, 2).x[:, :4].double()
    lifted = torch.cat([new, torch.relu(new @ map.projection.double() + map.offset.double())], 1)
    expected = lifted @ readout[:-1] + readout[-1]
    torch.testing.assert_close(map(new.float()).double(), expected, rtol=1e-2, atol=0.1)
    assert ((features > 0).double().mean(0) > 0.001).all() and ((features == 0).double().mean(0) > 0.001).all()


def test_the_seed_draws_and_nothing_else() -> None:
    fit, held_out = bent(600, 0), bent(200, 1)
    one, same, other = (random_features(fit, held_out, seed=seed) for seed in (0, 0, 1))
    assert one(held_out.x).equal(same(held_out.x)) and not one(held_out.x).equal(other(held_out.x))
    assert one.facts.method.endswith("on 20 random features") and one.facts.tokens == 600


def test_too_few_tokens_for_so_many_features_are_refused() -> None:
    with pytest.raises(NotTestable, match=r"49 aligned tokens are too few for a map from 25 to 5 .* at least 50"):
        random_features(bent(49, 0), bent(50, 1))


def test_tensors_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    map = random_features(bent(600, 0), bent(200, 1))
    path = map.save(tmp_path / "map.safetensors")
    assert load_map(path).widths == RandomFeatureMap.load(path).widths == (5, 5)
    assert set(load_file(path)) == {"projection", "offset", "weight", "bias"}
    with pytest.raises(InvalidInput, match="is no map"):
        LinearMap.load(path)
    with pytest.raises(InvalidInput, match="is no map"):
        RandomFeatureMap.load(ridge(bent(600, 0).moments(), bent(200, 1).moments()).save(tmp_path / "linear"))
    with pytest.raises((ValueError, TypeError)):
        replace(map, offset=torch.zeros(3))
