"""Principal directions of activation differences: the changes that the fine-tune adds."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.direction.direction import Direction, Provenance, chance_z
from molehunt.errors import NotTestable
from molehunt.site import Site


@dataclass
class PCAFitter:
    """Mean and scatter of a stream of rows, in float64 (d_model² numbers). Merged streams equal one pass over all rows."""

    site: Site
    n: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    scatter: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    """Scatter matrix Σ(row − mean)(row − mean)ᵀ."""

    def update(self, acts: Float[Tensor, "n d_model"]) -> "PCAFitter":
        """Add rows, usually tuned − base activations, one per token."""
        rows = acts.detach().double().cpu()
        if len(rows):
            mean = rows.mean(0)
            centred = rows - mean
            self.merge(PCAFitter(self.site, len(rows), mean, centred.mT @ centred))
        return self

    def merge(self, other: "PCAFitter") -> "PCAFitter":
        """Add the rows of another fitter (Chan et al. 1983). Raises ValueError for another site."""
        if other.site != self.site:
            raise ValueError(f"cannot merge {other.site} into {self.site}")
        if not self.n:
            self.n, self.mean, self.scatter = other.n, other.mean, other.scatter
        elif other.n:
            n, shift = self.n + other.n, other.mean - self.mean
            self.scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.n * other.n / n)
            self.mean = self.mean + shift * (other.n / n)
            self.n = n
        return self

    def directions(self, k: int) -> list[Direction]:
        """The k directions of largest variance, strongest first, each with its largest entry positive.

        Strength is the standard deviation along the direction, and `share` its fraction of the variance. `z` compares
        it with the first direction of white noise with the same number of rows and the same total variance.
        Directions without variance are left out.

        Raises:
            NotTestable: there are fewer than two rows or no variance, or an activation is NaN or infinite.
        """
        total = float(self.scatter.trace()) if self.n else 0.0
        if self.n < 2 or not math.isfinite(total) or total <= 0:
            raise NotTestable(f"No principal direction at {self.site}: {self.n} rows with variance {total}.")
        values, vectors = torch.linalg.eigh(self.scatter)
        found: list[Direction] = []
        shape = (self.n - 1, len(self.mean))  # centring costs one row
        for rank in range(min(k, len(values))):
            value, vector = float(values[-1 - rank]), vectors[:, -1 - rank]
            if value <= total * len(values) * torch.finfo(torch.float64).eps:
                break
            facts = Provenance(
                source="pca",
                rank=rank,
                strength=math.sqrt(value / (self.n - 1)),
                share=value / total,
                z=chance_z(math.sqrt(value), math.sqrt(total), shape) if min(shape) > 1 else None,
            )
            sign = vector[vector.abs().argmax()].sign()
            found.append(Direction(self.site, (sign * vector).float(), facts))
        return found


def pca_directions(site: Site, acts: Float[Tensor, "n d_model"], *, k: int) -> list[Direction]:
    """Principal directions of `acts`; see `PCAFitter.directions`."""
    return PCAFitter(site).update(acts).directions(k)
