import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.site import Site
from molehunt.steer.clip import Clip

SITE = Site(0)


@given(st.integers(1, 6), st.integers(8, 24), st.integers(0, 999))
def test_orthogonal_projections_end_inside_their_range_and_moved_no_further(k, d_model, seed):
    rng = torch.Generator().manual_seed(seed)
    units = torch.linalg.qr(torch.randn(d_model, k, generator=rng)).Q.mT
    lo = -torch.rand(k, generator=rng)
    hi = lo + torch.rand(k, generator=rng)
    acts = 2 * torch.randn(3, 5, d_model, generator=rng)

    edited = Clip(SITE, 7 * units, lo, hi)(acts)  # their length does not count

    torch.testing.assert_close(edited @ units.mT, (acts @ units.mT).clamp(lo, hi), rtol=1e-4, atol=1e-4)
    rest = acts - (acts @ units.mT) @ units
    torch.testing.assert_close(edited - (edited @ units.mT) @ units, rest, rtol=1e-4, atol=1e-4)


def test_strength_is_the_share_of_the_way():
    acts = torch.tensor([[[5.0, 1.0], [-3.0, 1.0], [0.5, 1.0]]])
    clip = Clip(SITE, torch.tensor([[1.0, 0.0]]), torch.tensor([-1.0]), torch.tensor([1.0]), strength=0.5)
    assert clip(acts).tolist() == [[[3.0, 1.0], [-2.0, 1.0], [0.5, 1.0]]]


def test_tokens_inside_every_range_are_bit_equal_and_the_others_not():
    acts = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    clip = Clip(SITE, torch.eye(8)[:2], torch.full((2,), -1.0), torch.full((2,), 1.0))
    edited = clip(acts)
    inside = (acts[..., :2].abs() <= 1).all(-1)
    assert inside.any()
    assert not inside.all()
    assert edited[inside].equal(acts[inside])
    assert (edited[~inside] != acts[~inside]).any(-1).all()


def test_overlapping_directions_act_one_after_the_other():
    directions = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    zero = torch.zeros(2)
    # (2, 1): first to (0, 1), whose second projection is .8, taken out along (.6, .8)
    edited = Clip(SITE, directions, zero, zero)(torch.tensor([[[2.0, 1.0]]]))
    torch.testing.assert_close(edited, torch.tensor([[[-0.48, 0.36]]]))


def test_a_range_that_ends_before_it_starts_is_an_error():
    with pytest.raises(ValueError, match="at most its hi"):
        Clip(SITE, torch.eye(2), torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
