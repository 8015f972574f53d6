"""Reading two models at once, and maps trained by gradient."""

from dataclasses import replace

import pytest
import torch

from molehunt.activation.scale import sinks
from molehunt.errors import NotTestable, UsageError
from molehunt.site import Site
from molehunt.transfer.alignment import Aligned
from molehunt.transfer.collect import PairActs, acts_of, moments_of, paired
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.map_file import ModelHashes
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
    with pytest.raises(NotTestable, match="no position of 1 rows"):
        acts_of(model, model, [Aligned(source=(1, 2), target=(1, 2), pairs=())], *SITES)


def test_the_activations_of_one_pair_are_those_of_the_grid_and_know_their_texts() -> None:
    source, target = tiny_model("llama", 0), tiny_model("llama", 1)
    some, models = rows(12), ModelHashes(source="a", target="b")
    got = acts_of(source, target, some, SITES[0], SITES[1], models=models)
    grid = moments_of(source, target, some, sources=SITES[:1], targets=SITES[1:], models=models)
    for name in ("source", "target", "cross", "target_mean"):
        ours, theirs = getattr(got.moments(), name), getattr(grid.pair(*SITES), name)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert got.moments().models == grid.pair(*SITES).models == models
    for i in (0, 5):
        (alone,) = paired(source, target, some[i : i + 1], sources=SITES[:1], targets=SITES[1:])
        torch.testing.assert_close(got.x[got.row == i], alone.x[0], rtol=1e-4, atol=1e-5)


def test_no_block_after_the_deepest_site_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tiny_model("llama", 0), tiny_model("llama", 1)

    def never(*_, **__):
        raise AssertionError("a block ran that nobody reads")

    for model in (source, target):
        monkeypatch.setattr(model.model.layers[2], "forward", never)
    assert moments_of(source, target, rows(4), sources=SITES[:1], targets=SITES[1:]).count


def data(n: int, seed: int) -> PairActs:
    rng, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(5)
    weight = torch.randn(8, 6, generator=fixed)
    x = torch.randn(n, 8, generator=rng) + 1
    y = x @ weight + 0.1 * torch.randn(n, 6, generator=rng)
    return PairActs(source_site=Site(0), target_site=Site(1), x=x, y=y, row=torch.arange(n) // 10)


@pytest.mark.parametrize("kind", ["affine", "autoencoder"])
def test_training_learns_what_is_linear_and_ridge_is_at_least_as_good(kind) -> None:
    fit, held_out = data(2000, 0), data(500, 1)
    config = TrainedConfig(lr=1e-2, epochs=30, texts=20)
    map = train_map(kind, fit, held_out, config)
    fvu, cosine = quality(map, held_out)
    best = held_out.moments().fvu(ridge_path(fit.moments(), [0.0])[0])
    assert best <= fvu < 0.1 and cosine > 0.95
    assert map.history[-1] == (300, fvu, cosine, None) and map.history[0].fvu > fvu
    again = train_map(kind, fit, held_out, config)
    assert again(held_out.x[:5]).equal(map(held_out.x[:5]))
    other = train_map(kind, fit, held_out, TrainedConfig(lr=1e-2, epochs=30, texts=20, seed=1))
    assert not other(held_out.x[:5]).equal(map(held_out.x[:5]))
    x = held_out.x
    torch.testing.assert_close(map.difference(x[:3], x[3:6]), map(x[:3]) - map(x[3:6]))


def test_unexplained_variance_is_that_of_the_moments() -> None:
    fit, held_out = data(400, 0), data(100, 1)
    map = train_map("affine", fit, held_out, TrainedConfig(epochs=1))
    linear = LinearMap(Site(0), Site(1), map.net.weight.mT, map.net.bias)
    assert quality(map, held_out)[0] == pytest.approx(held_out.moments().fvu(linear), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "steps", "evaluations"),
    [({"texts": 10}, 12, 12), ({"texts": 40, "epochs": 1}, 1, 1), ({"texts": 10, "epochs": 2, "evaluations": 2}, 8, 4)],
)
def test_a_step_takes_as_many_texts_as_asked(options, steps, evaluations) -> None:
    history = train_map("affine", data(400, 0), data(50, 1), TrainedConfig(**options)).history
    assert history[-1].step == steps and len(history) == evaluations


def test_tokens_go_with_their_text_wherever_they_lie() -> None:
    fit, held_out = data(400, 0), data(50, 1)
    order = torch.arange(400).reshape(40, 10).mT.flatten()  # the first token of each text, then the second of each
    apart = replace(fit, x=fit.x[order], y=fit.y[order], row=fit.row[order])
    config = TrainedConfig(texts=3)
    whole, mixed = (train_map("affine", some, held_out, config) for some in (fit, apart))
    assert mixed(held_out.x).equal(whole(held_out.x))


def test_the_hidden_width_is_the_geometric_mean_or_as_asked() -> None:
    fit, held_out = data(200, 0), data(50, 1)
    assert train_map("autoencoder", fit, held_out).net[0].weight.shape == (7, 8)
    assert train_map("autoencoder", fit, held_out, TrainedConfig(hidden=8)).net[0].weight.shape == (8, 8)
    assert train_map("affine", fit, held_out).widths == (8, 6)
    assert train_map("autoencoder", fit, held_out).widths == (8, 6)


def test_what_is_watched_is_kept_and_changes_nothing() -> None:
    fit, held_out = data(400, 0), data(50, 1)
    seen = []

    def monitor(map) -> float:
        seen.append(map(held_out.x[:1]).clone())
        return float(len(seen))

    watched = train_map("affine", fit, held_out, monitor=monitor)
    assert [one.kl for one in watched.history] == [float(i + 1) for i in range(len(seen))]
    assert not seen[0].equal(seen[-1])
    assert watched(held_out.x).equal(train_map("affine", fit, held_out)(held_out.x))


def test_the_rate_falls_when_nothing_is_gained() -> None:
    fit, held_out = data(400, 0), data(50, 1)
    fvus = []
    for patience in (1000, 3):
        config = TrainedConfig(lr=0.5, epochs=60, texts=5, evaluations=1, patience=patience)
        fvus.append(train_map("affine", fit, held_out, config).history[-1].fvu)
    assert fvus[1] < 0.7 * fvus[0]


def test_training_that_diverges_or_other_widths_are_told() -> None:
    fit, held_out = data(400, 0), data(50, 1)
    huge = PairActs(source_site=Site(0), target_site=Site(1), x=fit.x * 1e30, y=fit.y, row=fit.row)
    with pytest.raises(NotTestable, match="diverged"):
        train_map("autoencoder", huge, huge, TrainedConfig(lr=1e30))
    with pytest.raises(UsageError, match=r"from 8 dimensions at L0.resid; the activations have 6"):
        train_map("affine", fit, held_out)(held_out.y)
