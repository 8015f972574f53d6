"""PCA of activation differences: streaming equals batch equals an SVD of the centred rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.direction.pca import PCAFitter, pca_directions
from molehunt.errors import NotTestable
from molehunt.site import Site

SITE = Site(1)


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    spread = torch.arange(d, 0, -1.0)
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * spread + 100


@given(st.integers(3, 40), st.integers(2, 12), st.integers(0, 40), st.integers(0, 99))
def test_streaming_and_merging_equal_an_svd_of_the_centred_rows(n: int, d: int, cut: int, seed: int) -> None:
    acts = rows(n, d, seed)
    one = PCAFitter(SITE).update(acts[:cut]).update(acts[cut:]).directions(2)
    two = PCAFitter(SITE).update(acts[:cut]).merge(PCAFitter(SITE).update(acts[cut:])).directions(2)
    centred = acts.double() - acts.double().mean(0)
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    for rank, (a, b) in enumerate(zip(one, two, strict=True)):
        torch.testing.assert_close(a.vector, b.vector, rtol=0, atol=1e-4)
        gaps = (s - s[rank]).abs().masked_fill(torch.arange(len(s)) == rank, 1e9)
        if gaps.min() > 0.1:
            assert abs(float(a.vector.double() @ vh[rank])) == pytest.approx(1.0, abs=1e-5)
        assert a.provenance.strength == pytest.approx(float(s[rank]) / (n - 1) ** 0.5, rel=1e-5)
        assert a.provenance.share == pytest.approx(float(s[rank] ** 2 / s.square().sum()), rel=1e-5)
        assert a.provenance.rank == rank
        assert a.vector[a.vector.abs().argmax()] > 0


def test_white_noise_is_chance_and_a_planted_direction_is_not() -> None:
    noise = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    assert abs(pca_directions(SITE, noise, k=1)[0].provenance.z or 9) < 4
    planted = torch.nn.functional.normalize(torch.arange(40.0), dim=0)
    noise[::10] += 5 * planted
    found = pca_directions(SITE, noise, k=1)[0]
    assert float(found.vector @ planted) > 0.95
    assert (found.provenance.z or 0) > 20


def test_only_directions_with_variance_are_given() -> None:
    acts = torch.zeros(5, 3)
    acts[:, 1] = torch.arange(5.0)
    (only,) = pca_directions(SITE, acts, k=3)
    torch.testing.assert_close(only.vector, torch.tensor([0.0, 1.0, 0.0]))
    assert only.provenance.share == pytest.approx(1.0)
    assert pca_directions(SITE, acts[:2], k=3)[0].provenance.z is None  # two rows leave no shape to compare with


@pytest.mark.parametrize("acts", [torch.zeros(0, 3), torch.ones(1, 3), torch.ones(4, 3), torch.full((3, 3), torch.inf)])
def test_no_direction_is_made_up(acts: torch.Tensor) -> None:
    with pytest.raises(NotTestable, match=r"No principal direction at L1\.resid"):
        pca_directions(SITE, acts, k=1)


def test_other_sites_do_not_mix() -> None:
    with pytest.raises(ValueError, match="cannot merge"):
        PCAFitter(SITE).merge(PCAFitter(Site(2)))
