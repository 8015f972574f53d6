"""A radius inside which no perturbation makes the behaviour's first token recover, proved by adding noise.

Source: Cohen et al., arXiv 1902.02918, at the hook. The certificate is for the decision under Gaussian noise at the anchor,
not for the bare model's. The attacks bound the bare model's radius from above; this bounds the noisy model's from below.
"""

import torch
from jaxtyping import Float, Int
from scipy.special import ndtri
from torch import Tensor

from molehunt.measure.interval import proportion
from molehunt.run.progress import Track, silent
from molehunt.stress.attacks.suffix import Suffix

ALPHA = 0.001


def largest_provable(sigma: float, draws: int, *, alpha: float = ALPHA) -> float:
    """The radius of a row that no draw changes, σ Φ⁻¹(alpha^(1/draws)): the largest that can be proved."""
    return sigma * float(ndtri(alpha ** (1 / draws)))


@torch.no_grad()
def smoothed_radius(
    suffix: Suffix,
    tokens: Int[Tensor, " batch"],
    sigma: Float[Tensor, " batch"],
    *,
    draws: int = 200,
    alpha: float = ALPHA,
    seed: int = 0,
    track: Track = silent,
) -> Float[Tensor, " batch"]:
    """σ Φ⁻¹(p) for each row, where p is the exact lower limit of how often noise leaves another first token.

    The radius is 0 where p ≤ ½.

    Args:
        suffix: prompts under their defence; its first position is perturbed.
        tokens: the first token of each row's suppressed answer.
        sigma: standard deviation of the noise on each coordinate, for each row.
        draws: number of noise draws. The radius is at most `largest_provable`.
        alpha: chance that one row's radius is too large.
        seed: seed of the noise.
        track: shows the draws.
    """
    rng = torch.Generator().manual_seed(seed)
    unchanged = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    anchor = suffix.entering[:, 0]
    for _ in track(range(draws), "noise for the lower radius", draws):
        noise = torch.randn(anchor.shape, generator=rng).to(anchor.device)
        perturbed = suffix.entering.clone()
        perturbed[:, 0] = anchor + sigma[:, None] * noise
        unchanged += suffix(perturbed)[:, 0].argmax(-1) != tokens
    low = [proportion(int(k), draws, confidence=1 - 2 * alpha).low for k in unchanged]
    return torch.tensor(
        [max(0.0, float(s) * float(ndtri(p))) if p > 0.5 else 0.0 for s, p in zip(sigma, low, strict=True)]
    )
