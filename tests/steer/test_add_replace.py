import pytest
import torch

from molehunt.site import Site
from molehunt.steer.add import Add
from molehunt.steer.replace import Replace

SITE = Site(0)
ACTS = torch.arange(24.0).reshape(2, 3, 4)


def test_add_takes_strength_times_the_direction_as_it_is():
    edited = Add(SITE, torch.tensor([0.0, 2.0, 0.0, -1.0]), 1.5)(ACTS)
    assert (edited - ACTS).reshape(-1, 4).unique(dim=0).tolist() == [[0.0, 3.0, 0.0, -1.5]]


def test_replace_is_exact_at_strength_1_and_a_mix_below():
    source = -ACTS.flip(0)
    assert Replace(SITE, source)(ACTS).equal(source)
    torch.testing.assert_close(Replace(SITE, source, strength=0.25)(ACTS), 0.75 * ACTS + 0.25 * source)


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 3, 4), (2, 1, 4)])
def test_a_source_of_one_row_or_one_position_serves_all(shape):
    source = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert Replace(SITE, source)(ACTS).equal(source.expand(2, 3, 4))


@pytest.mark.parametrize("shape", [(2, 2, 4), (3, 3, 4), (1, 1, 5)])
def test_a_source_that_does_not_fit_is_told(shape):
    with pytest.raises(ValueError, match=r"at L0\.resid: batch and pos must be equal, or 1"):
        Replace(SITE, torch.zeros(shape))(ACTS)
