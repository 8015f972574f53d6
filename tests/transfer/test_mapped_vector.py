"""Steering vectors carried from one model to another."""

import pytest
import torch

from molehunt.errors import NotTestable, UsageError
from molehunt.site import Site
from molehunt.steer.vector import SteeringVector, VectorFacts
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.map_file import MapFacts, ModelHashes
from molehunt.transfer.mapped_vector import mapped_means, mapped_vector, shrinkage
from molehunt.transfer.ridge import ridge_path
from molehunt.transfer.statistics import PairMoments
from molehunt.transfer.trained import TrainedMap

A, B = Site(1), Site(2)
FACTS = VectorFacts(method="difference in means", model="a", n_layers=4, d_model=5, positive=7, negative=9)
WEIGHT = torch.randn(5, 6, generator=torch.Generator().manual_seed(4))


def moments(noise: float, n: int = 20_000) -> PairMoments:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=rng) + 3
    return PairMoments.of(A, B, x, x @ WEIGHT + noise * torch.randn(n, 6, generator=rng) - 8)


def vector(**facts: object) -> SteeringVector:
    own = VectorFacts(**{**vars(FACTS), **facts})
    return SteeringVector({1: torch.arange(1.0, own.d_model + 1), 3: torch.ones(own.d_model)}, own)


def test_without_noise_a_vector_goes_through_the_weight_and_meets_no_bias() -> None:
    fit = moments(0.0)
    (map,) = ridge_path(fit, [0.0])
    map = LinearMap(A, B, map.weight, map.bias, MapFacts(method="ridge", models=ModelHashes(source="a", target="b")))
    got = mapped_vector(vector(), map, fit, n_layers=8)
    torch.testing.assert_close(got.vectors[2], vector().vectors[1] @ WEIGHT, rtol=1e-3, atol=1e-3)
    assert list(got.vectors) == [2] and (got.facts.n_layers, got.facts.d_model, got.facts.model) == (8, 6, "b")
    assert got.facts.method == "difference in means, carried over by ridge"
    assert (got.facts.positive, got.facts.negative) == (7, 9)
    twice = mapped_vector(2 * vector(), map, fit, n_layers=8)
    torch.testing.assert_close(twice.vectors[2], 2 * got.vectors[2])


def test_what_the_penalty_shrinks_is_made_long_again() -> None:
    fit = moments(0.0)
    source = vector().vectors[1]
    for penalty in (1.0, 10.0):
        (map,) = ridge_path(fit, [penalty])
        short = map.difference(source[None], torch.zeros(1, 5))[0]
        got = mapped_vector(vector(), map, fit, n_layers=8).vectors[2]
        assert short.norm() < 0.6 * got.norm()
        torch.testing.assert_close(got, source @ WEIGHT, rtol=0.05, atol=0.2)


def test_the_factor_is_the_ratio_of_spreads_along_the_vector() -> None:
    fit = moments(3.0)
    (map,) = ridge_path(fit, [1e-3])
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 5, generator=rng) + 3
    y = x @ WEIGHT + 3.0 * torch.randn(20_000, 6, generator=rng) - 8
    along = torch.randn(6, generator=rng)
    unit = along / along.norm()
    expected = float((y @ unit).std() / (map(x) @ unit).std())
    assert shrinkage(map, fit, along) == pytest.approx(expected, rel=1e-3) and expected > 1.2
    assert shrinkage(map, fit, 3 * along) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "map_source", "why"),
    [
        ({}, Site(0), r"this map is from L0.resid, 5 dimensions; the vector is of L1.resid, L3.resid, 5 dimensions"),
        ({"d_model": 4}, A, r"from L1.resid, 5 dimensions; the vector is of L1.resid, L3.resid, 4 dimensions"),
        ({"model": "other"}, A, r"another checkpoint \(a\) than the vector's \(other\)"),
        ({}, Site(1, "mlp"), r"steering vectors act on block outputs; this map is from L1.mlp to L2.resid"),
    ],
)
def test_a_vector_of_another_place_is_refused(given: dict, map_source: Site, why: str) -> None:
    map = LinearMap(map_source, B, WEIGHT, torch.zeros(6), MapFacts(models=ModelHashes(source="a", target="b")))
    with pytest.raises(UsageError, match=why):
        mapped_vector(vector(**given), map, moments(0.0, 100), n_layers=8)


def test_a_vector_that_the_map_loses_is_told() -> None:
    map = LinearMap(A, B, torch.zeros(5, 6), torch.zeros(6))
    with pytest.raises(NotTestable, match="takes this vector to nothing"):
        mapped_vector(vector(), map, moments(0.0, 100), n_layers=8)


def test_under_a_map_that_bends_a_vector_is_the_difference_of_two_images() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 6)).requires_grad_(False)
    map = TrainedMap(kind="autoencoder", source=A, target=B, net=net, facts=MapFacts(method="autoencoder"))
    plus, minus = torch.randn(5), torch.randn(5)
    got = mapped_means(map, plus, minus, FACTS, n_layers=8)
    torch.testing.assert_close(got.vectors[2], net(plus) - net(minus))
    assert not torch.allclose(got.vectors[2], net(plus - minus), atol=0.05)
    assert got.facts.d_model == 6 and got.facts.method.endswith("carried over by autoencoder")
