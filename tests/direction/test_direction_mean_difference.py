"""Mean difference: streaming equals batch, merging equals one pass, chance is 1."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.direction.mean_difference import MeanDifferenceFitter, SampleMean, mean_difference
from molehunt.errors import NotTestable
from molehunt.site import Site

SITE = Site(3)


def rows(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 12), st.integers(0, 40), st.integers(0, 99))
def test_streaming_and_merging_equal_the_definition(n: int, m: int, d: int, cut: int, seed: int) -> None:
    a, b = (
        rows(n, d, seed, shift=1e4),
        rows(m, d, seed + 1, shift=1e4 - 3),
    )  # means far larger than the spread
    one = MeanDifferenceFitter(SITE).update(a[:cut], b[:cut]).update(a[cut:], b[cut:]).direction()
    merged = MeanDifferenceFitter(SITE).update(a[:cut], b[:cut])
    two = merged.merge(MeanDifferenceFitter(SITE).update(a[cut:], b[cut:])).direction()

    shift = a.double().mean(0) - b.double().mean(0)
    sampling = a.double().var(0).sum() / n + b.double().var(0).sum() / m
    for found in (one, two):
        torch.testing.assert_close(found.vector.double(), shift / shift.norm(), rtol=0, atol=1e-6)
        assert found.provenance.strength == pytest.approx(float(shift.norm()), rel=1e-9)
        assert found.provenance.over_floor == pytest.approx(float(shift.norm() / sampling.sqrt()), rel=1e-6)


def test_the_vector_points_from_b_to_a_and_swapping_turns_it() -> None:
    a, b = torch.tensor([[4.0, 0], [6.0, 0]]), torch.tensor([[1.0, 0], [1.0, 0]])
    found = mean_difference(SITE, a, b)
    assert found.vector.tolist() == [1.0, 0.0] and found.provenance.strength == 4.0
    assert mean_difference(SITE, b, a).vector.tolist() == [-1.0, 0.0]
    # a's variance is 2 over 2 rows, b has none: noise of length 1
    assert found.provenance.over_floor == pytest.approx(4.0)
    assert mean_difference(SITE, a[:1].repeat(2, 1), b).provenance.over_floor is None  # no spread at all


def test_two_samples_of_one_law_score_about_one() -> None:
    found = mean_difference(SITE, rows(300, 64, 0).bfloat16(), rows(400, 64, 1).bfloat16())
    assert 0.7 < (found.provenance.over_floor or 0) < 1.3


@pytest.mark.parametrize(
    ("a", "b"),
    [(rows(1, 4, 0), rows(5, 4, 1)), (rows(5, 4, 0), rows(0, 4, 1)), (torch.ones(3, 4), torch.ones(2, 4))],
)
def test_no_direction_is_made_up(a: torch.Tensor, b: torch.Tensor) -> None:
    with pytest.raises(NotTestable):
        mean_difference(SITE, a, b)
    with pytest.raises(NotTestable, match="nan"):
        mean_difference(SITE, torch.full((3, 4), float("nan")), torch.ones(3, 4))


def test_other_sites_do_not_mix_and_empty_streams_change_nothing() -> None:
    with pytest.raises(ValueError, match=r"cannot merge L4\.resid into L3\.resid"):
        MeanDifferenceFitter(SITE).merge(MeanDifferenceFitter(Site(4)))
    mean = SampleMean().update(rows(5, 3, 0))
    before = (mean.n, mean.mean.clone(), mean.squares)
    mean.merge(SampleMean())
    assert before[0] == mean.n and torch.equal(before[1], mean.mean) and before[2] == mean.squares
