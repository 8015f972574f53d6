"""The size of activations: running moments that merge exactly as one pass, and tokens that are attention sinks."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

SINK_TIMES_MEDIAN = 10.0
"""A token whose norm is more than this many times the median of its row is a sink."""


@dataclass(frozen=True, eq=False, slots=True)
class Moments:
    """First and second moments of a set of activations, in fp64.

    Law: `Moments.of(a).merge(Moments.of(b))` equals `Moments.of(torch.cat([a, b]))` up to fp64 rounding.
    """

    count: int
    """Number of tokens."""
    mean: Float64[Tensor, " d_model"]
    """Zeros where `count` is 0."""
    scatter: Float64[Tensor, " d_model"]
    """Sum over tokens of the squared distance from the mean."""

    @classmethod
    def empty(cls, d_model: int) -> "Moments":
        """Moments of no token: merging them changes nothing."""
        return cls(0, torch.zeros(d_model, dtype=torch.float64), torch.zeros(d_model, dtype=torch.float64))

    @classmethod
    def of(cls, acts: Float[Tensor, "tokens d_model"]) -> "Moments":
        """Moments of all rows at once, on whatever device they lie; the result is on the CPU."""
        if not len(acts):
            return cls.empty(acts.shape[1])
        exact = acts.double()
        mean = exact.mean(0)
        return cls(len(acts), mean.cpu(), (exact - mean).square_().sum(0).cpu())

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets together (Chan, Golub & LeVeque 1979, the pairwise update)."""
        count = self.count + other.count
        if count == 0:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        scatter = self.scatter + other.scatter + apart.square() * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    @property
    def rms(self) -> float:
        """Root of the mean square over tokens and dimensions, in units of the activations; 0 of no token."""
        return float((self.scatter / max(self.count, 1) + self.mean.square()).mean().sqrt())

    @property
    def spread(self) -> float:
        """As `rms`, of what is left once the mean is taken off; 0 of activations that are all the same."""
        return float((self.scatter / max(self.count, 1)).mean().sqrt())


def all_finite(values: Tensor) -> bool:
    """No NaN and no infinity; looks at each value only where a sum of all, several times as fast, leaves it open."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def sinks(acts: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """True at the first token of each row, and where a norm exceeds 10 times the median norm of the row's real tokens.

    Such tokens carry attention, not content, and a few of them would make up most of a mean square (Sun et al.,
    arXiv 2402.17762). A row's answer depends on that row's real tokens alone.
    """
    norms = acts.float().norm(dim=-1)
    median = norms.masked_fill(~mask, torch.nan).nanmedian(dim=1, keepdim=True).values
    first = mask.cumsum(1) == 1
    return mask & (first | (norms > SINK_TIMES_MEDIAN * median))
