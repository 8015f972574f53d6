"""The direction between the means of two sets of activations: the baseline of every other method."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.direction.direction import Direction, Provenance
from molehunt.errors import NotTestable
from molehunt.site import Site


@dataclass
class SampleMean:
    """Count, mean and total variance of a stream of rows, in float64. Merged streams equal one pass over all rows."""

    n: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    squares: float = 0.0
    """Σ‖row − mean‖²."""

    def update(self, acts: Float[Tensor, "n d_model"]) -> "SampleMean":
        rows = acts.detach().double().cpu()
        if len(rows):
            mean = rows.mean(0)
            self.merge(SampleMean(len(rows), mean, float((rows - mean).square().sum())))
        return self

    def merge(self, other: "SampleMean") -> "SampleMean":
        """Chan et al. 1983, parallel form: no cancellation however large the mean."""
        if not self.n:
            self.n, self.mean, self.squares = other.n, other.mean, other.squares
        elif other.n:
            n, shift = self.n + other.n, other.mean - self.mean
            self.squares += other.squares + float(shift.square().sum()) * self.n * other.n / n
            self.mean = self.mean + shift * (other.n / n)
            self.n = n
        return self


@dataclass
class MeanDifferenceFitter:
    """Takes activations of two classes in batches; `direction()` may be called at any time."""

    site: Site
    a: SampleMean = field(default_factory=SampleMean)
    b: SampleMean = field(default_factory=SampleMean)

    def update(self, acts_a: Float[Tensor, "n d_model"], acts_b: Float[Tensor, "m d_model"]) -> "MeanDifferenceFitter":
        self.a.update(acts_a)
        self.b.update(acts_b)
        return self

    def merge(self, other: "MeanDifferenceFitter") -> "MeanDifferenceFitter":
        """Add the rows of another fitter at the same site. Raises ValueError for another site."""
        if other.site != self.site:
            raise ValueError(f"cannot merge {other.site} into {self.site}")
        self.a.merge(other.a)
        self.b.merge(other.b)
        return self

    def direction(self) -> Direction:
        """The unit vector from the mean of b to the mean of a.

        Strength is the length of the shift. `over_floor` is its ratio to the length that sampling noise alone is
        expected to give, √(tr Σa / na + tr Σb / nb): about 1 when the two classes do not differ.

        Raises:
            NotTestable: a class has fewer than two rows, the means are equal, or an activation is NaN or infinite.
        """
        if self.a.n < 2 or self.b.n < 2:
            raise NotTestable(f"A mean difference needs at least 2 rows of each kind, got {self.a.n} and {self.b.n}.")
        shift = self.a.mean - self.b.mean
        strength = float(shift.norm())
        if not math.isfinite(strength) or strength == 0:
            raise NotTestable(f"The means at {self.site} differ by {strength}: there is no direction between them.")
        sampling = math.sqrt(sum(side.squares / (side.n - 1) / side.n for side in (self.a, self.b)))
        return Direction(
            self.site,
            (shift / strength).float(),
            Provenance(
                source="mean-difference",
                strength=strength,
                over_floor=strength / sampling if sampling else None,
            ),
        )


def mean_difference(site: Site, acts_a: Float[Tensor, "n d_model"], acts_b: Float[Tensor, "m d_model"]) -> Direction:
    """Direction from the mean of `acts_b` to the mean of `acts_a`; see `MeanDifferenceFitter.direction`."""
    return MeanDifferenceFitter(site).update(acts_a, acts_b).direction()
