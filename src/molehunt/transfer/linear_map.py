"""An affine map between activation spaces, whichever way it was fitted."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.errors import UsageError
from molehunt.site import Site
from molehunt.transfer.map_file import MapFacts, SavedMap, read_map, write_map

KIND = "linear"


@dataclass(frozen=True, eq=False)
class LinearMap:
    """acts @ weight + bias, from one model's activations at `source` to another's at `target`.

    Law: `LinearMap.load(map.save(path))` maps as `map` does, bit for bit.
    """

    source: Site
    target: Site
    weight: Float[Tensor, "d_source d_target"]
    bias: Float[Tensor, " d_target"]
    facts: MapFacts = field(default_factory=MapFacts)

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[1:]:
            raise ValueError(f"a weight {list(self.weight.shape)} and a bias {list(self.bias.shape)} are no affine map")

    @property
    def widths(self) -> tuple[int, int]:
        """Dimensions of the source and of the target."""
        return self.weight.shape[0], self.weight.shape[1]

    def __call__(self, acts: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d_target"]:
        """Mapped activations, in fp32. Raises UsageError for activations of another width."""
        return self._times(acts) + self.bias.to(acts.device, torch.float32)

    def difference(
        self, plus: Float[Tensor, "tokens d"], minus: Float[Tensor, "tokens d"]
    ) -> Float[Tensor, "tokens d_target"]:
        """The image of a difference of activations, in which the bias cancels. Raises as a call."""
        return self._times(plus.float() - minus.float())

    def _times(self, acts: Tensor) -> Tensor:
        if acts.shape[-1] != self.weight.shape[0]:
            raise UsageError(
                f"this map is from {self.weight.shape[0]} dimensions at {self.source}; the activations have "
                f"{acts.shape[-1]}.\nGive those of the model that it was fitted to."
            )
        return acts.float() @ self.weight.to(acts.device, torch.float32)

    def inverse(self) -> "LinearMap":
        """The way back by pseudo-inverse, as published; a ridge of its own is the better one (see `ridge`)."""
        inverse = torch.linalg.pinv(self.weight.double())
        facts = replace(
            self.facts, method=f"pseudo-inverse of {self.facts.method}", models=self.facts.models.reversed()
        )
        return LinearMap(self.target, self.source, inverse, -self.bias.double() @ inverse, facts)

    def save(self, path: Path) -> Path:
        """One safetensors file, whole or not at all. Returns `path`."""
        return write_map(path, KIND, self, self.facts, {"weight": self.weight, "bias": self.bias})

    @classmethod
    def load(cls, path: Path) -> "LinearMap":
        """Read what `save` wrote. Raises InvalidInput for anything else."""
        return read_map(path, cls.of_saved)

    @classmethod
    def of_saved(cls, saved: SavedMap) -> "LinearMap":
        """Raises ValueError for a map of another kind."""
        if saved.kind != KIND:
            raise ValueError(f"it is a {saved.kind} map, not a linear one")
        return cls(saved.source, saved.target, saved.tensors["weight"], saved.tensors["bias"], saved.facts)
