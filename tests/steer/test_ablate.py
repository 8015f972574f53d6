import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.site import Site
from molehunt.steer.ablate import Ablate, orthonormal

SITE = Site(0)


@given(st.integers(1, 6), st.integers(8, 40), st.integers(0, 999), st.sampled_from([0.25, 1.0, 2.0]))
def test_projection_moves_to_the_centers_and_the_rest_stays(k, d_model, seed, strength):
    rng = torch.Generator().manual_seed(seed)
    directions = torch.randn(k, d_model, generator=rng)
    acts, center = torch.randn(2, 3, d_model, generator=rng), torch.randn(d_model, generator=rng)
    for middle in (None, center):
        edited = Ablate(SITE, directions, center=middle, strength=strength)(acts)
        target = torch.zeros(d_model) if middle is None else middle
        wanted = (1 - strength) * (acts - target) @ directions.mT + target @ directions.mT
        torch.testing.assert_close(edited @ directions.mT, wanted, rtol=1e-3, atol=1e-3)
        q = torch.linalg.qr(directions.mT, mode="complete").Q[:, k:]  # everything orthogonal to the directions
        torch.testing.assert_close(edited @ q, acts @ q, rtol=1e-3, atol=1e-3)


def test_ablating_twice_is_ablating_once():
    acts = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    ablate = Ablate(SITE, torch.eye(8)[:3] + 0.5)
    torch.testing.assert_close(ablate(ablate(acts)), ablate(acts))


def test_repeated_directions_count_once_and_no_direction_is_an_error():
    direction = torch.tensor([3.0, 4.0, 0.0])
    basis = orthonormal(torch.stack([direction, -2 * direction, torch.zeros(3)]))
    torch.testing.assert_close(basis.abs(), torch.tensor([[0.6, 0.8, 0.0]]))
    for nothing in (torch.zeros(2, 3), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="empty or all zero"):
            Ablate(SITE, nothing)
