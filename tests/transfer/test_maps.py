"""Moments and the maps that come from them, against the activations themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.errors import InvalidInput, NotTestable
from molehunt.model.site import Site
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.procrustes import identity, procrustes
from molehunt.transfer.ridge import PENALTIES, reduced_rank, ridge, ridge_path
from molehunt.transfer.statistics import GridMoments, PairMoments

A, B = Site(1), Site(2)


def planted(n: int, seed: int, *, d_source: int = 6, d_target: int = 9, noise: float = 0.1):
    """Correlated activations with means far from 0 and unlike scales, and what a fixed affine map makes of them."""
    rng, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    mix = torch.randn(d_source, d_source, generator=fixed, dtype=torch.float64)
    weight = torch.randn(d_source, d_target, generator=fixed, dtype=torch.float64)
    x = torch.randn(n, d_source, generator=rng, dtype=torch.float64) @ mix * torch.logspace(-1, 1, d_source) + 30.0
    y = x @ weight + 5.0 + noise * torch.randn(n, d_target, generator=rng, dtype=torch.float64)
    return x, y


def moments(x: torch.Tensor, y: torch.Tensor) -> PairMoments:
    return PairMoments.of(A, B, x, y)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 99))
def test_merged_shards_are_one_pass(sizes: list[int], seed: int) -> None:
    x, y = planted(sum(sizes), seed)
    whole = GridMoments.empty([A, B], [B], 6, 9).with_tokens(torch.stack([x, 2 * x]), y[None])
    parts = GridMoments.empty([A, B], [B], 6, 9)
    for some_x, some_y in zip(x.split(sizes), y.split(sizes), strict=True):
        shard = GridMoments.empty([A, B], [B], 6, 9).with_tokens(torch.stack([some_x, 2 * some_x]), some_y[None])
        parts = parts.merge(shard)
    assert parts.count == whole.count == sum(sizes)
    for name in ("source_mean", "target_mean", "source", "target", "cross"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-7)
    pair = whole.pair(B, B)
    centred = 2 * x - 2 * x.mean(0)
    torch.testing.assert_close(pair.source, centred.mT @ centred, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(pair.cross, centred.mT @ (y - y.mean(0)), rtol=1e-9, atol=1e-7)


def test_moments_come_back_from_disk(tmp_path: Path) -> None:
    x, y = planted(50, 0)
    grid = GridMoments.empty([A], [B], 6, 9).with_tokens(x[None], y[None])
    grid.save(tmp_path / "shard.safetensors")
    again = GridMoments.load(tmp_path / "shard.safetensors")
    assert again.count == 50 and again.sources == (A,) and again.cross.equal(grid.cross)


def test_ridge_without_penalty_is_least_squares() -> None:
    x, y = planted(400, 0)
    (map,) = ridge_path(moments(x, y), [0.0])
    stacked = np.concatenate([x.numpy(), np.ones((400, 1))], 1)
    expected = np.linalg.lstsq(stacked, y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(map.weight.numpy(), expected[:-1], rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(map.bias.numpy(), expected[-1], rtol=1e-6)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_ridge_is_the_slow_formula(penalty: float) -> None:
    x, y = planted(300, 1)
    (map,) = ridge_path(moments(x, y), [penalty])
    cx, cy = x - x.mean(0), y - y.mean(0)
    gram = cx.mT @ cx
    expected = torch.linalg.solve(gram + penalty * gram.diagonal().diag(), cx.mT @ cy)
    torch.testing.assert_close(map.weight, expected, rtol=1e-6, atol=1e-8)


@given(st.integers(0, 50), st.integers(20, 200))
def test_unexplained_variance_from_moments_is_that_of_the_activations(seed: int, n: int) -> None:
    fitted = ridge_path(moments(*planted(100, 7)), [1e-2])[0]
    x, y = planted(n, seed, noise=2.0)
    missed = (fitted(x.float()).double() - y).square().sum() / (y - y.mean(0)).square().sum()
    assert moments(x, y).fvu(fitted) == pytest.approx(float(missed), rel=1e-3, abs=1e-5)


def test_the_held_out_tokens_choose_and_noise_is_all_that_is_left() -> None:
    fit, held_out, fresh = (moments(*planted(n, seed)) for n, seed in ((600, 0), (300, 1), (300, 2)))
    best = ridge(fit, held_out)
    assert held_out.fvu(best) == min(held_out.fvu(map) for map in ridge_path(fit))
    assert fresh.fvu(best) < 1e-4
    few, others = moments(*planted(14, 3, noise=20.0)), moments(*planted(300, 4, noise=20.0))
    paths = {p: others.fvu(m) for p, m in zip(PENALTIES, ridge_path(few), strict=True)}
    assert others.fvu(ridge(few, others)) < paths[PENALTIES[0]]


def test_pairs_that_are_shuffled_teach_nothing() -> None:
    x, y = planted(400, 0)
    held_out = moments(*planted(400, 1))
    shuffled = moments(x, y[torch.randperm(400, generator=torch.Generator().manual_seed(0))])
    assert held_out.fvu(ridge(shuffled, held_out)) > 0.95 > 0.01 > held_out.fvu(ridge(moments(x, y), held_out))


def test_a_map_of_full_rank_is_itself_and_of_lower_rank_the_best_there_is() -> None:
    x, y = planted(500, 0, noise=1.0)
    fit = moments(x, y)
    (full,) = ridge_path(fit, [0.0])
    torch.testing.assert_close(reduced_rank(full, fit, 9).weight, full.weight, rtol=1e-6, atol=1e-8)
    predictions = (x - x.mean(0)) @ full.weight
    u, s, vh = torch.linalg.svd(predictions, full_matrices=False)
    for rank in (1, 2, 4):
        got = reduced_rank(full, fit, rank)
        assert torch.linalg.matrix_rank(got.weight) == rank
        expected = u[:, :rank] * s[:rank] @ vh[:rank]
        torch.testing.assert_close((x - x.mean(0)) @ got.weight, expected, rtol=1e-5, atol=1e-5)
    fvus = [fit.fvu(reduced_rank(full, fit, rank)) for rank in range(1, 7)]
    assert fvus == sorted(fvus, reverse=True)


@pytest.mark.parametrize("widths", [(6, 6), (5, 9), (9, 5)])
def test_procrustes_finds_a_planted_rotation(widths: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    wide, narrow = max(widths), min(widths)
    rotation = torch.linalg.qr(torch.randn(wide, narrow, generator=rng, dtype=torch.float64)).Q
    rotation = rotation if widths[0] == wide else rotation.mT
    x = torch.randn(300, widths[0], generator=rng, dtype=torch.float64) + 3
    fit = moments(x, 2.5 * x @ rotation - 1)
    found = procrustes(fit)
    if widths[0] <= widths[1]:
        torch.testing.assert_close(found.weight, 2.5 * rotation, rtol=1e-6, atol=1e-8)
    assert fit.fvu(found) < 1e-9 or widths[0] > widths[1]
    assert fit.fvu(procrustes(fit, scaled=False)) > fit.fvu(found)
    gram = found.weight.mT @ found.weight if widths[0] > widths[1] else found.weight @ found.weight.mT
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(narrow, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_the_identity_pair_maps_to_itself() -> None:
    x, _ = planted(300, 0)
    fit = moments(x, x)
    for map in (ridge_path(fit, [0.0])[0], procrustes(fit), identity(fit)):
        torch.testing.assert_close(map.weight, torch.eye(6, dtype=torch.float64), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(map(x.float()), x.float(), rtol=1e-3, atol=1e-2)
    assert fit.cka() == pytest.approx(1) and fit.svcca() == pytest.approx(1)


def test_similarity_ignores_what_it_should() -> None:
    x, y = planted(500, 0, noise=5.0)
    rng = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(9, 9, generator=rng, dtype=torch.float64)).Q
    plain, turned = moments(x, y), moments(3 * x - 2, y @ turn)
    assert plain.cka() == pytest.approx(turned.cka()) and plain.svcca() == pytest.approx(turned.svcca())
    noise = moments(torch.randn(5000, 6, generator=rng), torch.randn(5000, 9, generator=rng))
    assert noise.cka() < 0.01 and noise.svcca() < 0.1
    stretch = torch.randn(6, 6, generator=rng, dtype=torch.float64)
    assert moments(x, x @ stretch).svcca(1.0) == pytest.approx(1, abs=1e-6)
    assert 0 < moments(x, x @ stretch).cka() < 0.99


def test_the_way_back_by_ridge_beats_the_pseudo_inverse_where_the_target_is_noisy() -> None:
    fit, fresh = (moments(*planted(500, seed, d_target=6, noise=20.0)) for seed in (0, 1))
    forward = ridge(fit, fresh)
    back = ridge(fit.reversed(), fresh.reversed())
    assert back.source == B and back.target == A
    assert fresh.reversed().fvu(back) < 0.9 * fresh.reversed().fvu(forward.inverse())
    torch.testing.assert_close(forward.inverse().inverse().weight, forward.weight, rtol=1e-5, atol=1e-6)


def test_differences_lose_the_bias() -> None:
    x, y = planted(200, 0)
    map = ridge(moments(x, y), moments(x, y))
    plus, minus = x[:5].float(), x[5:10].float()
    torch.testing.assert_close(map.difference(plus, minus), map(plus) - map(minus), rtol=1e-3, atol=1e-2)


def test_a_map_comes_back_from_disk_and_other_files_are_refused(tmp_path: Path) -> None:
    map = ridge_path(moments(*planted(100, 0)), [1e-3])[0]
    path = tmp_path / "map.safetensors"
    map.save(path, method="ridge")
    again = LinearMap.load(path)
    assert again.weight.equal(map.weight) and again.bias.equal(map.bias) and (again.source, again.target) == (A, B)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InvalidInput, match="is no map"):
        LinearMap.load(path)
    with pytest.raises(InvalidInput, match="is no map"):
        LinearMap.load(tmp_path / "missing")


def test_too_little_is_said_with_the_numbers() -> None:
    x, y = planted(11, 0)
    with pytest.raises(NotTestable, match=r"11 aligned tokens .* from 6 to 9 .* at least 12"):
        ridge_path(moments(x, y))
    with pytest.raises(NotTestable, match="never vary"):
        procrustes(moments(torch.ones(50, 3), torch.ones(50, 3)))
    grid = GridMoments.empty([A], [B], 6, 9)
    with pytest.raises(ValueError, match="other sites"):
        grid.merge(GridMoments.empty([B], [B], 6, 9))
    with pytest.raises(KeyError, match="was not read"):
        grid.pair(B, B)
