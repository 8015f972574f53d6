"""Moments and the maps that come from them, against the activations themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from molehunt.errors import InvalidInput, NotTestable, UsageError
from molehunt.site import Site
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.map_file import ModelHashes
from molehunt.transfer.procrustes import identity, procrustes
from molehunt.transfer.ridge import PENALTIES, RANK_SLACK, Solver, of_rank, reduced_rank, ridge, ridge_path
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
    torch.testing.assert_close(of_rank(full, fit, 9).weight, full.weight, rtol=1e-6, atol=1e-8)
    predictions = (x - x.mean(0)) @ full.weight
    u, s, vh = torch.linalg.svd(predictions, full_matrices=False)
    for rank in (1, 2, 4):
        got = of_rank(full, fit, rank)
        assert torch.linalg.matrix_rank(got.weight) == rank
        expected = u[:, :rank] * s[:rank] @ vh[:rank]
        torch.testing.assert_close((x - x.mean(0)) @ got.weight, expected, rtol=1e-5, atol=1e-5)
    fvus = [fit.fvu(of_rank(full, fit, rank)) for rank in range(1, 7)]
    assert fvus == sorted(fvus, reverse=True)


def test_the_lowest_rank_that_is_about_as_good_is_taken() -> None:
    rng = torch.Generator().manual_seed(0)
    narrow = torch.randn(6, 2, generator=rng, dtype=torch.float64) @ torch.randn(2, 9, generator=rng).double()
    fit, held_out = (
        moments(x, x @ narrow + 0.1 * torch.randn(n, 9, generator=rng, dtype=torch.float64))
        for n in (500, 300)
        for x in (torch.randn(n, 6, generator=rng, dtype=torch.float64),)
    )
    got, full = reduced_rank(fit, held_out), ridge(fit, held_out)
    assert torch.linalg.matrix_rank(got.weight) == 2 and got.facts.method.endswith("rank 2")
    assert held_out.fvu(got) <= (1 + RANK_SLACK) * held_out.fvu(full)
    sizes = torch.tensor([1, 1, 0.25, 0.25, 0, 0], dtype=torch.float64).diag()
    x, noise = (torch.randn(9000, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    halves = [PairMoments.of(A, B, x[i::2], x[i::2] @ sizes + 0.5 * noise[i::2]) for i in (0, 1)]
    loses = halves[1].fvu(of_rank(ridge(*halves), halves[0], 2)) / halves[1].fvu(ridge(*halves))
    assert 1.05 < loses < 1.12 and reduced_rank(*halves).facts.method.endswith("rank 4")
    full_rank = [moments(*planted(n, n)) for n in (500, 300)]
    assert reduced_rank(*full_rank).weight.equal(ridge(*full_rank).weight)


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
    again = LinearMap.load(map.save(path))
    assert again.weight.equal(map.weight) and again.bias.equal(map.bias) and (again.source, again.target) == (A, B)
    assert again.facts == map.facts and map.facts.method == "ridge, λ = 0.001" and map.facts.tokens == 100
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
    x[3, 0] = float("inf")
    with pytest.raises(NotTestable, match=r"L1.resid or L2.resid hold values that are no number"):
        procrustes(moments(x, y))
    with pytest.raises(KeyError, match="was not read"):
        GridMoments.empty([A], [B], 6, 9).pair(B, B)


def test_moments_of_other_sites_or_models_are_not_merged() -> None:
    named = GridMoments.empty([A], [B], 6, 9, ModelHashes(source="a" * 64, target="b" * 64))
    with pytest.raises(UsageError, match=r"these are of L1.resid to L2.resid, those of L2.resid to L2.resid"):
        named.merge(GridMoments.empty([B], [B], 6, 9))
    with pytest.raises(UsageError, match=r"source a{12}…, target b{12}…, those of unnamed models"):
        named.merge(GridMoments.empty([A], [B], 6, 9))
    x, y = planted(50, 0)
    fit = named.with_tokens(x[None], y[None]).pair(A, B)
    assert ridge(fit, fit).facts.models == ModelHashes(source="a" * 64, target="b" * 64)
    assert ridge(fit.reversed(), fit.reversed()).facts.models.source == "b" * 64


def test_what_spans_too_few_dimensions_has_a_ridge_and_no_least_squares() -> None:
    x, y = planted(100, 0)
    x[:, 4] = x[:, 0] + x[:, 1]
    x[:, 5] = 7.0
    fit = moments(x, y)
    with pytest.raises(NotTestable, match=r"the 100 tokens at L1.resid span 4 of 6 dimensions"):
        ridge_path(fit, [1e-3, 0.0])
    alone = moments(x[:, :4], y)
    for penalty in (1e-6, 1e-3):
        (got,) = ridge_path(fit, [penalty])
        assert got.weight.isfinite().all() and not got.weight[5].abs().max() > 1e-6
        assert fit.fvu(got) == pytest.approx(alone.fvu(ridge_path(alone, [penalty])[0]), rel=0.05, abs=1e-6)


@given(st.integers(0, 30))
def test_all_penalties_at_once_are_each_one_alone(seed: int) -> None:
    fit, held_out = moments(*planted(60, seed, noise=5.0)), moments(*planted(40, seed + 100, noise=5.0))
    got = Solver.of(fit.source).unexplained(fit, held_out, PENALTIES)
    assert got == pytest.approx([held_out.fvu(map) for map in ridge_path(fit)], rel=1e-7, abs=1e-9)


def test_shuffled_moments_are_distributed_as_those_of_shuffled_tokens() -> None:
    x, y = planted(40, 0, d_source=2, d_target=2, noise=30.0)
    fit = PairMoments.of(A, B, x, y)
    rng = torch.Generator().manual_seed(1)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    by_hand = torch.stack([centred_x.mT @ centred_y[torch.randperm(40, generator=rng)] for _ in range(3000)])
    drawn = torch.stack([fit.shuffled(seed).cross for seed in range(3000)])
    unit = by_hand.std(0)
    torch.testing.assert_close(drawn.mean(0) / unit, torch.zeros(2, 2, dtype=torch.float64), rtol=0, atol=0.08)
    a, b = (torch.cov((each / unit).flatten(1).mT) for each in (by_hand, drawn))
    torch.testing.assert_close(a, b, rtol=0, atol=0.1)
    assert fit.shuffled(3).cross.equal(fit.shuffled(3).cross) and fit.shuffled(3).source.equal(fit.source)


def test_activations_and_moments_of_another_width_are_refused_with_the_numbers() -> None:
    map = ridge_path(moments(*planted(100, 0)), [1e-3])[0]
    with pytest.raises(UsageError, match=r"from 6 dimensions at L1.resid; the activations have 5"):
        map(torch.zeros(3, 5))
    with pytest.raises(UsageError, match="the activations have 5"):
        map.difference(torch.zeros(3, 5), torch.zeros(3, 5))
    with pytest.raises(UsageError, match="from 6 to 9 dimensions cannot be judged on activations of 5 and 9"):
        moments(*planted(100, 0, d_source=5)).fvu(map)


@pytest.mark.parametrize("broken", ["text", "no header", "a width", "a site", "a schema", "missing"])
def test_what_holds_no_moments_is_refused(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "shard.safetensors"
    grid = GridMoments.empty([A], [B], 2, 3).with_tokens(torch.randn(1, 9, 2), torch.randn(1, 9, 3))
    grid.save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    if broken == "text":
        path.write_text("none")
    elif broken == "no header":
        save_file(tensors, path)
    elif broken == "a width":
        save_file({**tensors, "source_mean": torch.zeros(1, 5, dtype=torch.float64)}, path, header)
    elif broken == "a site":
        save_file(tensors, path, {name: value.replace("L1.resid", "L1.elsewhere") for name, value in header.items()})
    elif broken == "a schema":
        save_file(tensors, path, {name: value.replace('"schema": 1', '"schema": 2') for name, value in header.items()})
    else:
        path.unlink()
    with pytest.raises(InvalidInput, match="is no file of moments"):
        GridMoments.load(path)
