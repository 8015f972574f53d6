"""What every map of the catalogue owes. A new row gets these tests for one example."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from molehunt.contracts import TransferMap
from molehunt.errors import NotTestable, UsageError
from molehunt.site import Site
from molehunt.transfer.catalog import CATALOG
from molehunt.transfer.collect import PairActs
from molehunt.transfer.map_file import ModelHashes
from molehunt.transfer.method import FromMoments, map_method
from molehunt.transfer.ridge import shuffled
from molehunt.transfer.saved import load_map
from molehunt.transfer.statistics import GridMoments
from molehunt.transfer.trained import TrainedConfig

A, B = Site(1), Site(2)
MODELS = ModelHashes(source="a", target="b", source_tokenizer="c", target_tokenizer="d")
D_SOURCE, D_TARGET = 6, 8
RNG = torch.Generator().manual_seed(3)
ANY = torch.randn(D_SOURCE, D_TARGET, generator=RNG)
ROTATION = 1.7 * torch.linalg.qr(torch.randn(D_TARGET, D_TARGET, generator=RNG)).Q[:D_SOURCE]
NARROW = torch.randn(D_SOURCE, 2, generator=RNG) @ torch.randn(2, D_TARGET, generator=RNG)
LONG = {"config": TrainedConfig(lr=1e-2, epochs=150, texts=16)}


@dataclass(frozen=True)
class Example:
    """A linear map of the kind that the method can find, and how much of it may be left unexplained."""

    planted: torch.Tensor
    left: float
    options: dict


EXAMPLES = {
    "ridge": Example(ANY, 1e-9, {}),
    "reduced-rank": Example(NARROW, 1e-9, {}),
    "procrustes": Example(ROTATION, 1e-9, {}),
    "identity": Example(torch.eye(D_SOURCE, D_TARGET), 1e-9, {}),
    "affine": Example(ANY, 1e-3, LONG),
    "autoencoder": Example(ANY, 0.05, {"config": TrainedConfig(lr=1e-2, epochs=120, texts=16, hidden=32)}),
    "random-features": Example(ANY, 1e-5, {}),
    "shuffled": Example(ANY, 1.5, {}),
}
every = pytest.mark.parametrize("name", sorted(CATALOG))
learns = pytest.mark.parametrize("name", sorted(set(CATALOG) - {"shuffled"}))
FROM_MOMENTS = sorted(name for name in CATALOG if isinstance(map_method(name), FromMoments))
closed = pytest.mark.parametrize("name", FROM_MOMENTS)


def acts(n: int, seed: int, planted: torch.Tensor) -> PairActs:
    x = torch.randn(n, planted.shape[0], generator=torch.Generator().manual_seed(seed)) + 0.5
    return PairActs(source_site=A, target_site=B, x=x, y=x @ planted + 2.0, row=torch.arange(n) // 8, models=MODELS)


def fitted(name: str, fit: PairActs, held_out: PairActs, **options):
    method = map_method(name)
    if isinstance(method, FromMoments):
        return method.fit(fit.moments(), held_out.moments(), **options)
    short = {} if name == "random-features" else {"config": TrainedConfig(epochs=1)}
    return method.fit(fit, held_out, **{**short, **options})


def unexplained(map: TransferMap, on: PairActs) -> float:
    return float((map(on.x) - on.y).square().sum() / (on.y - on.y.mean(0)).square().sum())


def test_every_row_has_an_example_here() -> None:
    assert set(EXAMPLES) == set(CATALOG)


@every
def test_fulfils_the_contract_and_knows_where_it_comes_from(name) -> None:
    map = fitted(name, acts(100, 0, ANY), acts(50, 1, ANY))
    assert isinstance(map, TransferMap)
    assert (map.source, map.target, map.widths) == (A, B, (D_SOURCE, D_TARGET))
    assert map(torch.zeros(3, D_SOURCE)).shape == (3, D_TARGET)
    assert map.facts.method != "given" and map.facts.tokens == 100 and map.facts.models == MODELS


@every
def test_finds_what_is_planted(name) -> None:
    example = EXAMPLES[name]
    map = fitted(name, acts(800, 0, example.planted), acts(200, 1, example.planted), **example.options)
    left = unexplained(map, acts(300, 2, example.planted))
    assert left < example.left
    if name == "shuffled":
        assert left > 0.9, "the control learns nothing"


@learns
def test_an_identity_pair_is_mapped_to_itself(name) -> None:
    eye = torch.eye(D_SOURCE)
    fit, held_out = ((some.x, some) for some in (acts(800, 0, eye), acts(200, 1, eye)))
    same = [PairActs(source_site=A, target_site=B, x=x, y=x, row=some.row) for x, some in (fit, held_out)]
    map = fitted(name, *same, **EXAMPLES[name].options)
    new = acts(100, 2, eye).x
    tolerance = {"autoencoder": 0.3, "affine": 0.05, "random-features": 1e-3}.get(name, 1e-4)
    assert float((map(new) - new).abs().max()) < 10 * tolerance
    assert float((map(new) - new).square().mean()) < tolerance**2


@learns
def test_beats_the_shuffled_control(name) -> None:
    planted = EXAMPLES[name].planted + 0.1 * ANY
    fit, held_out, new = (acts(n, seed, planted) for n, seed in ((800, 0), (200, 1), (300, 2)))
    control = unexplained(shuffled(fit.moments(), held_out.moments()), new)
    assert unexplained(fitted(name, fit, held_out, **EXAMPLES[name].options), new) < 0.7 * control


@closed
def test_merged_moments_give_the_map_of_one_pass(name) -> None:
    fit, held_out = acts(300, 0, ANY), acts(100, 1, ANY).moments()
    shards = GridMoments.empty([A], [B], D_SOURCE, D_TARGET, MODELS)
    for x, y in zip(fit.x.split([70, 1, 229]), fit.y.split([70, 1, 229]), strict=True):
        shards = shards.merge(GridMoments.empty([A], [B], D_SOURCE, D_TARGET, MODELS).with_tokens(x[None], y[None]))
    method: Callable = map_method(name).fit
    one, merged = method(fit.moments(), held_out), method(shards.pair(A, B), held_out)
    torch.testing.assert_close(merged.weight, one.weight, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(merged.bias, one.bias, rtol=1e-7, atol=1e-8)
    assert merged.facts == one.facts


@every
def test_comes_back_from_disk_and_maps_bit_for_bit_the_same(name, tmp_path: Path) -> None:
    map = fitted(name, acts(100, 0, ANY), acts(50, 1, ANY))
    again = load_map(map.save(tmp_path / "map.safetensors"))
    new = acts(20, 2, ANY).x
    assert type(again) is type(map) and again(new).equal(map(new))
    assert (again.source, again.target, again.widths, again.facts) == (A, B, map.widths, map.facts)
    assert getattr(again, "history", None) == getattr(map, "history", None)


@every
def test_the_same_twice_and_each_token_by_itself(name) -> None:
    fit, held_out, new = acts(100, 0, ANY), acts(50, 1, ANY), acts(9, 2, ANY).x
    map, again = (fitted(name, fit, held_out) for _ in range(2))
    assert map(new).equal(again(new))
    torch.testing.assert_close(map(new)[4:5], map(new[4:5]), rtol=1e-4, atol=1e-5)
    before = new.clone()
    map(new)
    assert new.equal(before), "not in place"


@every
def test_a_difference_loses_the_bias(name) -> None:
    map, new = fitted(name, acts(100, 0, ANY), acts(50, 1, ANY)), acts(9, 2, ANY).x
    torch.testing.assert_close(map.difference(new, new.flip(0)), map(new) - map(new.flip(0)), rtol=1e-4, atol=1e-4)
    assert not map.difference(new, new).abs().max() > 1e-6


@every
def test_another_width_is_refused_with_the_numbers(name) -> None:
    map = fitted(name, acts(100, 0, ANY), acts(50, 1, ANY))
    with pytest.raises(UsageError, match=rf"from {D_SOURCE} dimensions at L1.resid; the activations have 5"):
        map(torch.zeros(2, 5))


@pytest.mark.parametrize("name", sorted({*FROM_MOMENTS} - {"identity"}))  # which fits nothing
def test_what_never_varies_is_refused(name) -> None:
    still = PairActs(source_site=A, target_site=B, x=torch.ones(50, 6), y=torch.ones(50, 8), row=torch.zeros(50).long())
    with pytest.raises(NotTestable, match="never vary"):
        fitted(name, still, still)
