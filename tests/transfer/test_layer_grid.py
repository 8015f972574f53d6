"""The grid of all pairs against each pair by itself."""

import pytest
import torch

from molehunt.errors import NotTestable
from molehunt.site import Site
from molehunt.transfer.alignment import Aligned
from molehunt.transfer.collect import moments_of
from molehunt.transfer.fidelity import teacher_forced
from molehunt.transfer.layer_grid import LayerGrid, confirmed
from molehunt.transfer.ridge import PENALTIES, ridge, ridge_path
from molehunt.transfer.statistics import GridMoments
from tiny_models import VOCAB, tiny_model

SOURCES, TARGETS = [Site(0), Site(1), Site(2, "mlp")], [Site(0), Site(2)]


def planted(n: int, seed: int) -> GridMoments:
    """Target 0 follows source 1, target 1 follows source 2 less well, source 0 is noise; means far from 0."""
    rng = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(50)
    weights = torch.randn(2, 5, 7, generator=fixed, dtype=torch.float64)
    x = torch.randn(3, n, 5, generator=rng, dtype=torch.float64) * torch.logspace(-1, 1, 5) + 20
    noise = torch.randn(2, n, 7, generator=rng, dtype=torch.float64)
    y = torch.stack([x[1] @ weights[0] + 0.5 * noise[0], x[2] @ weights[1] + 8 * noise[1]])
    return GridMoments.empty(SOURCES, TARGETS, 5, 7).with_tokens(x, y)


def test_every_pair_is_what_it_is_alone() -> None:
    fit, held_out = planted(80, 0), planted(40, 1)
    grid = LayerGrid.of(fit, held_out)
    assert [(p.source, p.target) for p in grid.pairs] == [(s, t) for s in SOURCES for t in TARGETS]
    for pair in grid.pairs:
        here, there = fit.pair(pair.source, pair.target), held_out.pair(pair.source, pair.target)
        fvus = {p: there.fvu(map) for p, map in zip(PENALTIES, ridge_path(here), strict=True)}
        assert pair.fvu == pytest.approx(min(fvus.values()), rel=1e-7)
        assert fvus[pair.penalty] == min(fvus.values())
        assert pair.cka == pytest.approx(here.cka()) and pair.svcca == pytest.approx(here.svcca())


def test_the_best_pairs_are_the_planted_ones() -> None:
    grid = LayerGrid.of(planted(400, 0), planted(200, 1))
    best = grid.best(2)
    assert [(p.source, p.target) for p in best] == [(Site(1), Site(0)), (Site(2, "mlp"), Site(2))]
    assert best[0].fvu < best[1].fvu < 0.9 < grid.best(99)[2].fvu
    assert len(grid.best(99)) == 6 and best[0].svcca > 0.9 > 0.3 > grid.pairs[0].svcca


def test_too_few_tokens_or_a_site_that_never_varies_are_refused() -> None:
    with pytest.raises(NotTestable, match="9 aligned tokens are too few"):
        LayerGrid.of(planted(9, 0), planted(40, 1))
    x, y = torch.randn(3, 40, 5), torch.randn(2, 40, 7)
    y[1] = 3.0
    still = GridMoments.empty(SOURCES, TARGETS, 5, 7).with_tokens(x, y)
    with pytest.raises(NotTestable, match=r"at L0.resid or L2.resid never vary"):
        LayerGrid.of(still, planted(40, 1))


def rows(n: int, seed: int) -> list[Aligned]:
    rng = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, VOCAB, (12 + i % 5,), generator=rng).tolist() for i in range(n)]
    return [Aligned(source=tuple(r), target=tuple(r), pairs=tuple((i, i) for i in range(1, len(r)))) for r in made]


def test_confirmed_pairs_are_ordered_by_what_they_do_in_the_target() -> None:
    source, target, sites = tiny_model("llama", 0), tiny_model("llama", 1), [Site(0), Site(1)]
    fit, held_out = (moments_of(source, target, rows(n, n), sources=sites, targets=sites) for n in (60, 30))
    grid, fresh = LayerGrid.of(fit, held_out), rows(15, 7)
    fitted = [(pair, ridge(*(of.pair(pair.source, pair.target) for of in (fit, held_out)))) for pair in grid.best(3)]
    found = confirmed(source, target, fresh, fitted)
    recovered = [one.forced.ce_recovered().estimate for one in found]
    assert {one.pair for one in found} == set(grid.best(3)) and recovered == sorted(recovered, reverse=True)
    for one in found:
        alone = ridge(fit.pair(one.pair.source, one.pair.target), held_out.pair(one.pair.source, one.pair.target))
        assert one.map.weight.equal(alone.weight)
        expected = teacher_forced(source, target, fresh, {"map": alone})["map"].kl
        torch.testing.assert_close(one.forced.kl, expected, rtol=1e-4, atol=1e-5)
