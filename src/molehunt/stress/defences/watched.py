"""Values that a defence keeps in place at its site: codes of latents, or projections on directions."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from molehunt.dictionary.dictionary import Dictionary


@runtime_checkable
class WatchedValues(Protocol):
    """Values that a defence is meant to keep in place."""

    def pre(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        """The values before any threshold."""
        ...

    def codes(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        """The values after the threshold, where there is one."""
        ...


@dataclass(frozen=True, eq=False)
class WatchedLatents:
    """Some latents of a dictionary."""

    dictionary: Dictionary
    latents: Int[Tensor, " latents"]

    def pre(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        return self.dictionary.to(acts.device).pre_activations(acts, self.latents.to(acts.device))

    def codes(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        return self.dictionary.to(acts.device).encode_latents(acts, self.latents.to(acts.device))


@dataclass(frozen=True, eq=False)
class WatchedProjections:
    """Lengths along directions, such as those that a fix removes. They have no threshold."""

    directions: Float[Tensor, "n d_model"]

    def pre(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        return acts.float() @ self.directions.to(acts.device).T

    def codes(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        return self.pre(acts)
