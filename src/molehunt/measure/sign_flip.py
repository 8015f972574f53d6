"""The sign-flip test: whether the rows' differences are above zero, with the row as the unit."""

import itertools
from collections.abc import Sequence

import numpy as np

EXACT = 14
"""Greatest number of differences other than 0 of which all sign patterns are gone through."""
DRAWS = 9_999
"""Number of random sign patterns for more rows."""


def sign_flip_p(differences: Sequence[float], *, seed: int = 0) -> float:
    """One-sided p-value that the mean of paired differences is above zero by chance.

    Without an effect each row's difference is as likely to have the other sign. The p-value is the share of sign patterns,
    the observed one among them, whose sum is at least the observed sum.

    Source: Fisher's randomisation test for paired data, The Design of Experiments (1935), §21.
    """
    values = np.array([d for d in differences if d])
    if not len(values):
        return 1.0
    if len(values) <= EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
        return float((signs @ values >= values.sum() - 1e-9).mean())
    signs = np.random.default_rng(seed).choice((1.0, -1.0), size=(DRAWS, len(values)))
    return float((1 + (signs @ values >= values.sum() - 1e-9).sum()) / (DRAWS + 1))
