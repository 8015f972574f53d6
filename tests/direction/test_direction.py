"""Direction, Directions and the chance level."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.direction.direction import Direction, Directions, Provenance, chance_z, facts_of
from molehunt.direction.weight import lora_directions
from molehunt.site import Site


def example(k: int = 3) -> Directions:
    rng = torch.Generator().manual_seed(0)
    return lora_directions(torch.randn(7, k, generator=rng), torch.randn(k, 5, generator=rng), 2.0, k=k, name="W")


def test_a_direction_must_have_length_one() -> None:
    fact = Provenance(source="pca", strength=1.0)
    with pytest.raises(ValueError, match="length 1, got 2"):
        Direction(Site(0), torch.tensor([2.0, 0.0]), fact)
    assert Direction(Site(4), torch.tensor([0.0, 1.0]), fact).name == "L4.resid pca #0"


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path) -> None:
    before = example()
    before.save(tmp_path)
    after = Directions.load(tmp_path)
    for name, value in vars(before).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(after, name)), name
        else:
            assert value == getattr(after, name), name


def test_at_keeps_order_vectors_and_facts() -> None:
    found = example()
    listed = found.at(Site(2), "weight:o")
    assert [d.provenance.rank for d in listed] == [0, 1, 2]
    assert [d.name for d in listed] == [f"L2.resid weight:o #{i}" for i in range(3)]
    for row, d in zip(found.write, listed, strict=True):
        assert torch.equal(row, d.vector)
    assert sum(d.provenance.share or 0 for d in listed) == pytest.approx(1.0, abs=1e-5)
    assert listed[0].provenance.over_floor is None  # a factor is not rounded
    facts = facts_of(listed[0])
    assert facts["site"] == "L2.resid" and facts["tensor"] == "W"
    json.dumps(facts, allow_nan=False)


def test_ratio_to_the_floor() -> None:
    found = Directions(**{**vars(example()), "floor": 0.5})
    assert [d.provenance.over_floor for d in found.at(Site(0), "weight:o")] == pytest.approx(
        (found.strength / 0.5).tolist()
    )


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (40, 40), (30, 300)])
def test_a_random_update_scores_zero_with_unit_spread(shape: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(1)
    draws = torch.randn(600, *shape, generator=rng)
    tops = torch.linalg.matrix_norm(draws, ord=2)
    norms = torch.linalg.matrix_norm(draws)
    z = torch.tensor([chance_z(s, n, shape) for s, n in zip(tops.tolist(), norms.tolist(), strict=True)])
    assert abs(float(z.mean())) < 0.25  # 6 standard errors: the law is asymptotic
    assert 0.8 < float(z.std()) < 1.2


@given(st.floats(0.1, 10), st.floats(1e-4, 1e4), st.integers(2, 50), st.integers(2, 50))
def test_z_has_no_unit_and_no_orientation(strength: float, scale: float, m: int, n: int) -> None:
    z = chance_z(strength, 10.0, (m, n))
    assert chance_z(strength * scale, 10.0 * scale, (n, m)) == pytest.approx(z, rel=1e-6, abs=1e-6)
    assert chance_z(strength * 1.01, 10.0, (m, n)) > z


@pytest.mark.parametrize(("norm", "shape"), [(0.0, (4, 4)), (1.0, (1, 9)), (math.nan, (4, 4))])
def test_where_chance_is_undefined(norm: float, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="chance is defined"):
        chance_z(1.0, norm, shape)
