"""What a dictionary does not explain shrinks by a known share, and what it explains stays."""

from dataclasses import replace

import pytest
import torch

from molehunt.errors import NotTestable, UsageError
from molehunt.site import Site
from molehunt.steer.error_shrink import ErrorShrink
from molehunt.steer.span_clamp import SpanClamp
from random_dictionaries import FAMILIES, INPUT_NORMS, D, dictionary_of, some_acts

SITE = Site(1)


@pytest.mark.parametrize("norm", INPUT_NORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lambda_goes_from_nothing_changed_to_the_reconstruction(family: str, norm: str) -> None:
    dictionary, acts = replace(dictionary_of(family), norm=norm), some_acts()
    rebuilt = dictionary.reconstruct(acts)
    assert ErrorShrink(SITE, dictionary, strength=0)(acts) is acts  # λ = 1
    torch.testing.assert_close(ErrorShrink(SITE, dictionary)(acts), rebuilt, rtol=1e-5, atol=1e-5)  # λ = 0
    quarter = ErrorShrink(SITE, dictionary, strength=0.75)(acts)
    torch.testing.assert_close(quarter, rebuilt + 0.25 * (acts - rebuilt), rtol=1e-5, atol=1e-5)


def test_errors_like_benign_ones_are_kept() -> None:
    """Errors in a plane leave nothing to take away; what is added outside of it goes, and only that."""
    dictionary, rng = dictionary_of("relu"), torch.Generator().manual_seed(0)
    benign = some_acts(seed=1).reshape(-1, D)
    errors = benign - dictionary.reconstruct(benign)
    full = ErrorShrink.fit(SITE, dictionary, benign, D)
    acts = benign[None]
    torch.testing.assert_close(full(acts), acts, rtol=1e-4, atol=1e-4)  # 21 tokens span their own errors
    few = ErrorShrink.fit(SITE, dictionary, benign, 3)
    assert few.basis is not None and few.basis.shape == (3, D)
    left = few(acts) - dictionary.reconstruct(acts) - errors.mean(0)
    torch.testing.assert_close(left, left @ few.basis.T @ few.basis, rtol=1e-3, atol=1e-3)
    gone = [float((one(acts) - acts).norm()) for one in (few, ErrorShrink.fit(SITE, dictionary, benign, 9))]
    random = torch.linalg.qr(torch.randn(D, 3, generator=rng)).Q.T
    assert gone[1] < gone[0] < float((replace(few, components=random)(acts) - acts).norm())
    assert torch.equal(ErrorShrink.fit(SITE, dictionary, benign, 0).mean, full.mean)


def test_a_span_clamp_behind_it_still_holds() -> None:
    dictionary, acts, latents = dictionary_of("jumprelu"), some_acts(), torch.tensor([3, 8])
    edited = SpanClamp(SITE, dictionary, latents, -0.5)(ErrorShrink(SITE, dictionary)(acts))
    pre = dictionary.pre_activations(edited, latents)
    torch.testing.assert_close(pre, torch.full_like(pre, -0.5), rtol=1e-5, atol=1e-5)


def test_what_cannot_act_here_is_refused() -> None:
    dictionary = dictionary_of("relu")
    for given in ({"components": torch.ones(1, 5)}, {"mean": torch.zeros(5)}):
        with pytest.raises(UsageError, match=f"of 5 entries is no part of activations of {D}"):
            ErrorShrink(SITE, dictionary, **given)
    with pytest.raises(UsageError, match="transcoder"):
        ErrorShrink(SITE, replace(dictionary, W_skip=torch.eye(D)))
    with pytest.raises(NotTestable):
        ErrorShrink.fit(SITE, dictionary, torch.ones(1, D), 1)
