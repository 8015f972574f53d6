"""Reading two models at once, and maps trained by gradient."""

import pytest
import torch

from molehunt.activation.scale import sinks
from molehunt.errors import NotTestable
from molehunt.model.site import Site
from molehunt.transfer.alignment import Aligned
from molehunt.transfer.collect import moments_of, paired
from molehunt.transfer.ridge import ridge_path
from molehunt.transfer.statistics import PairMoments
from molehunt.transfer.trained import TrainedConfig, quality, train_map
from tiny_models import tiny_model

SITES = [Site(0), Site(1)]


def rows(n: int) -> list[Aligned]:
    """Rows of other lengths in either model; every second target token has a partner."""
    rng = torch.Generator().manual_seed(0)
    made = []
    for i in range(n):
        source = torch.randint(3, 60, (5 + i % 7,), generator=rng).tolist()
        target = [token for token in source for _ in range(2)]
        pairs = tuple((k, 2 * k + 1) for k in range(1, len(source)))
        made.append(Aligned(source=tuple(source), target=tuple(target), pairs=pairs))
    return made


def states(model, ids) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [h[0] for h in model(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states[1:]]


def test_paired_activations_are_those_of_each_row_alone_without_sinks() -> None:
    source, target = tiny_model("llama", 0), tiny_model("llama", 1)
    some = rows(9)
    got = list(paired(source, target, some, sources=SITES[:1], targets=SITES[:1]))
    x = torch.cat([each.x for each in got], 1)[0]
    y = torch.cat([each.y for each in got], 1)[0]
    expected_x, expected_y = [], []
    for row in sorted(some, key=lambda row: len(row.target)):
        a, b = states(source, row.source)[0], states(target, row.target)[0]
        out_a, out_b = (sinks(h[None], torch.ones(1, len(h), dtype=torch.bool))[0] for h in (a, b))
        for i, j in row.pairs:
            if not out_a[i] and not out_b[j]:
                expected_x.append(a[i])
                expected_y.append(b[j])
    torch.testing.assert_close(x, torch.stack(expected_x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, torch.stack(expected_y), rtol=1e-4, atol=1e-5)


def test_a_grid_of_pairs_holds_what_each_pair_alone_would() -> None:
    source, target = tiny_model("llama", 0), tiny_model("llama", 1)
    some = rows(12)
    grid = moments_of(source, target, some, sources=SITES, targets=SITES)
    got = list(paired(source, target, some, sources=SITES, targets=SITES))
    for i, a in enumerate(SITES):
        for j, b in enumerate(SITES):
            x, y = (torch.cat([getattr(each, name)[k] for each in got]) for name, k in (("x", i), ("y", j)))
            alone = PairMoments.of(a, b, x, y)
            torch.testing.assert_close(grid.pair(a, b).cross, alone.cross, rtol=1e-6, atol=1e-6)
            assert grid.pair(a, b).count == alone.count


def test_rows_that_nothing_pairs_are_refused() -> None:
    model = tiny_model("llama", 0)
    with pytest.raises(NotTestable, match="no position of 1 rows"):
        moments_of(model, model, [Aligned(source=(1, 2), target=(1, 2), pairs=())], sources=SITES, targets=SITES)


def data(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(5)
    weight = torch.randn(8, 6, generator=fixed)
    x = torch.randn(n, 8, generator=rng) + 1
    return x, x @ weight + 0.1 * torch.randn(n, 6, generator=rng)


@pytest.mark.parametrize("kind", ["affine", "autoencoder"])
def test_training_learns_what_is_linear_and_ridge_is_at_least_as_good(kind) -> None:
    x, y = data(2000, 0)
    held_out = data(500, 1)
    config = TrainedConfig(kind=kind, lr=1e-2, epochs=30, batch=200)
    map = train_map(Site(0), Site(1), x, y, held_out, config)
    fvu, cosine = quality(map, *held_out)
    best = PairMoments.of(Site(0), Site(1), *held_out).fvu(ridge_path(PairMoments.of(Site(0), Site(1), x, y), [0.0])[0])
    assert best <= fvu < 0.1 and cosine > 0.95
    assert map.history[-1][1:] == (fvu, cosine) and map.history[0][1] > fvu
    again = train_map(Site(0), Site(1), x, y, held_out, config)
    assert again(x[:5]).equal(map(x[:5]))
    torch.testing.assert_close(map.difference(x[:3], x[3:6]), map(x[:3]) - map(x[3:6]))


def test_training_that_diverges_says_so() -> None:
    x, y = data(400, 0)
    with pytest.raises(NotTestable, match="diverged"):
        train_map(Site(0), Site(1), x * 1e30, y, (x, y), TrainedConfig(kind="autoencoder", lr=1e30, batch=100))
