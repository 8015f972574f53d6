"""Moments that merge, and tokens that are sinks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.activation.scale import Moments, sinks


def acts(n: int, seed: int, *, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)) + shift


def same(a: Moments, b: Moments) -> None:
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.scatter, b.scatter, rtol=1e-11, atol=1e-11)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 99), st.sampled_from([0.0, 1e3]))
def test_merged_moments_are_those_of_one_pass(lengths: list[int], seed: int, shift: float) -> None:
    parts = [acts(n, seed + i, shift=shift * i) for i, n in enumerate(lengths)]
    merged = Moments.empty(5)
    for part in parts:
        merged = merged.merge(Moments.of(part))
    whole = torch.cat(parts)
    one = Moments.of(whole)
    assert merged.count == one.count
    torch.testing.assert_close(merged.mean, one.mean, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(merged.scatter, one.scatter, rtol=1e-9, atol=1e-9)
    if len(whole):
        exact = whole.double()
        assert merged.rms == pytest.approx(float(exact.square().mean().sqrt()), rel=1e-9)
        assert merged.spread == pytest.approx(float((exact - exact.mean(0)).square().mean().sqrt()), rel=1e-6, abs=1e-6)


def test_the_order_of_merging_does_not_matter() -> None:
    a, b, c = (Moments.of(acts(n, n)) for n in (3, 7, 5))
    same(a.merge(b).merge(c), c.merge(a.merge(b)))
    same(Moments.empty(5).merge(a), a)
    same(a.merge(Moments.empty(5)), a)


def test_a_large_mean_does_not_swallow_the_spread() -> None:
    one = Moments.of(acts(1000, 0, shift=1e4).double())
    assert one.spread == pytest.approx(1.0, rel=0.1)
    assert one.rms == pytest.approx(1e4, rel=1e-3)


def test_moments_by_hand() -> None:
    found = Moments.of(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    assert found.mean.tolist() == [2.0, 0.0]
    assert found.scatter.tolist() == [2.0, 0.0]
    assert found.rms == pytest.approx((10 / 4) ** 0.5)
    assert found.spread == pytest.approx(0.5**0.5)
    assert Moments.empty(2).rms == Moments.empty(2).spread == 0


def test_the_first_token_and_a_giant_are_sinks() -> None:
    norms = torch.tensor([[1.0, 1, 1, 10.5, 9.5, 99], [99, 99, 2, 2, 2, 19]])
    mask = torch.tensor([[True] * 5 + [False], [False, False, True, True, True, True]])
    found = sinks(norms[..., None] * torch.eye(3)[0], mask)
    assert found.tolist() == [[True, False, False, True, False, False], [False, False, True, False, False, False]]


@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 99))
def test_padding_and_other_rows_make_no_sink(length: int, padding: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    row = torch.randn(1, length, 3, generator=rng).exp() ** 3
    alone = sinks(row, torch.ones(1, length, dtype=torch.bool))
    padded = torch.full((2, length + padding, 3), 1e6)
    padded[0, padding:] = row
    mask = torch.zeros(2, length + padding, dtype=torch.bool)
    mask[0, padding:] = True
    mask[1] = True
    assert torch.equal(sinks(padded, mask)[:1, padding:], alone)
