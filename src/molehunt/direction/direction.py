"""A direction: a unit vector at a site, with the facts that support it."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.site import Site

TRACY_WIDOM_MEAN, TRACY_WIDOM_SD = -1.2065, 1.2680
"""Mean and standard deviation of the real (β = 1) Tracy-Widom distribution."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of a direction and its comparisons. A field that does not apply is None."""

    source: str
    """Method that found the direction: `weight:o`, `weight:down`, `mean-difference` or `pca`."""
    tensor: str | None = None
    """Name of the matrix in the checkpoint. It is untrusted text: print it through `printable`."""
    rank: int = 0
    """Rank by strength within its source, from 0 for the strongest."""
    strength: float
    """Singular value in units of the weights; shift or standard deviation in units of the activations."""
    share: float | None = None
    """Fraction of the squared Frobenius norm, or of the variance, that this direction alone explains."""
    z: float | None = None
    """Standard deviations above the strongest direction of a random change of equal norm; see `chance_z`."""
    over_floor: float | None = None
    """Ratio of the strength to the strength that rounding (weights) or sampling (activations) alone explains."""


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector in the residual stream, with its provenance.

    Raises:
        ValueError: the length of the vector is not 1.

    Example:
        >>> unit = torch.tensor([0.6, 0.8])
        >>> facts = Provenance(source="mean-difference", strength=2.5)
        >>> Direction(Site(3), unit, facts).name
        'L3.resid mean-difference #0'
    """

    site: Site
    vector: Float[Tensor, " d_model"]
    provenance: Provenance

    def __post_init__(self) -> None:
        length = float(self.vector.norm())
        if not math.isclose(length, 1.0, abs_tol=1e-3):
            raise ValueError(f"a direction has length 1, got {length:.4g}")

    @property
    def name(self) -> str:
        """Name that is unique among the directions of one pair and has no untrusted text: `L3.resid weight:o #0`."""
        return f"{self.site} {self.provenance.source} #{self.provenance.rank}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Directions:
    """The strongest singular directions of one matrix's change, strongest first. k may be 0.

    The sign of each `write` row makes its largest entry positive; `read` has the matching sign.
    """

    name: str
    """The tensor's name."""
    write: Float[Tensor, "k d_out"]
    """Orthonormal rows: directions that the change writes."""
    read: Float[Tensor, "k d_in"]
    """Orthonormal rows: input directions that make the change write."""
    strength: Float[Tensor, " k"]
    """Singular values, in units of the weights."""
    residual: Float[Tensor, " k"]
    """‖ΔW·read − strength·write‖. A true singular value lies within this distance of each strength."""
    remainder: float
    """Bound on the spectral norm of the rest of ΔW, without these directions."""
    norm: float
    """Frobenius norm of ΔW."""
    floor: float
    """Spectral norm that rounding alone explains; 0 if nothing was rounded."""

    @property
    def share(self) -> Float[Tensor, " k"]:
        """Fraction of ‖ΔW‖² in each direction."""
        return (self.strength / self.norm) ** 2

    @property
    def z(self) -> Float[Tensor, " k"]:
        """`chance_z` of each strength."""
        shape = (self.write.shape[1], self.read.shape[1])
        return torch.tensor([chance_z(s, self.norm, shape) for s in self.strength.tolist()])

    def at(self, site: Site, source: str) -> list[Direction]:
        """One `Direction` for each `write` row. The matrix must write to that site."""
        rows = zip(self.write, self.strength.tolist(), self.share.tolist(), self.z.tolist(), strict=True)
        return [
            Direction(
                site,
                write,
                Provenance(
                    source=source,
                    tensor=self.name,
                    rank=rank,
                    strength=strength,
                    share=share,
                    z=z,
                    over_floor=strength / self.floor if self.floor else None,
                ),
            )
            for rank, (write, strength, share, z) in enumerate(rows)
        ]

    def save(self, folder: Path) -> None:
        """Write directions.safetensors and directions.json into an existing folder."""
        from safetensors.torch import save_file

        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "directions.safetensors")
        facts = {name: value for name, value in vars(self).items() if name not in tensors}
        (folder / "directions.json").write_text(json.dumps(facts, allow_nan=False))

    @classmethod
    def load(cls, folder: Path) -> "Directions":
        """Read what `save` wrote, bit for bit."""
        from safetensors.torch import load_file

        facts = json.loads((folder / "directions.json").read_text())
        return cls(**load_file(folder / "directions.safetensors"), **facts)


def chance_z(strength: float, norm: float, shape: tuple[int, int]) -> float:
    """Distance of `strength` from the largest singular value of a Gaussian matrix of that norm and shape.

    The unit is the standard deviation of that value, so a random update scores 0 ± 1. The largest value of an m × n standard
    Gaussian is about √m + √n (Gordon), with fluctuations of the Tracy-Widom law on the scale of Johnstone,
    Ann. Statist. 29(2), 2001. Lower ranks are compared with the same, largest value, which is conservative.

    Raises:
        ValueError: a side of `shape` is below 2, where the scale is undefined, or `norm` is not positive.
    """
    m, n = min(shape), max(shape)
    if m < 2 or not norm > 0:
        raise ValueError(f"chance is defined for a change above 0 in a matrix of 2 × 2 or more, got {shape}")
    root_m, root_n = math.sqrt(m), math.sqrt(n - 1)
    edge = root_m + root_n
    # Johnstone scales the square of the value: d(s²) = 2·edge·ds
    scale = edge * (1 / root_m + 1 / root_n) ** (1 / 3) / (2 * edge)
    unit = strength * math.sqrt(m * n) / norm
    return (unit - edge - scale * TRACY_WIDOM_MEAN) / (scale * TRACY_WIDOM_SD)


def facts_of(direction: Direction) -> dict[str, object]:
    """All facts of a direction except its vector, for JSON."""
    return {"site": str(direction.site), **asdict(direction.provenance)}
