"""How far an attack moved what the defence watches, so that a behaviour that is back can be told from a defence undone.

Published (arXiv 2606.18322 §4): the codes after the nonlinearity, relative to those of the defended state. That is blind
below a threshold, and its denominator grows with the clamp (or is 0: then it says nothing). So pre-activations stand
beside it, and whether anything fired at all. Every perturbed position counts, the anchor first.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from molehunt.dictionary.dictionary import Dictionary

EPSILON = 1e-8


@runtime_checkable
class Watched(Protocol):
    """What a defence holds still."""

    def pre(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        """Before any threshold."""
        ...

    def codes(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]: ...


@dataclass(frozen=True, eq=False)
class Latents:
    """Some latents of a dictionary."""

    dictionary: Dictionary
    latents: Int[Tensor, " latents"]

    def pre(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        return self.dictionary.to(acts.device).pre_activations(acts, self.latents.to(acts.device))

    def codes(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        return self.dictionary.to(acts.device).encode_latents(acts, self.latents.to(acts.device))


@dataclass(frozen=True, eq=False)
class Projections:
    """Lengths along directions, such as those that a fix takes out: they have no threshold."""

    directions: Float[Tensor, "n d_model"]

    def pre(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        return acts.float() @ self.directions.to(acts.device).T

    def codes(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        return self.pre(acts)


@dataclass(frozen=True, eq=False, kw_only=True)
class Drift:
    """One number for each row, over all perturbed positions and everything watched."""

    pre: Float[Tensor, " batch"]
    """‖Δ pre-activations‖ / ‖pre-activations‖."""
    largest: Float[Tensor, " batch"]
    """The largest change of one pre-activation, in its own units."""
    codes: Float[Tensor, " batch"]
    """As published: ‖Δ codes‖ / (‖codes‖ + ε)."""
    floor: Float[Tensor, " batch"]
    """As published, clamp-floor violation: ‖[codes before − codes after]₊‖ / (‖codes before‖ + ε)."""
    reactivated: Float[Tensor, " batch"]
    """Of the watched that were silent, the share that fires now; not a number where none was silent."""
    silent: Bool[Tensor, " batch"]
    """Nothing watched fires in the defended state: the published drift then has nothing to be relative to."""


def drift_of(
    watched: Watched, defended: Float[Tensor, "batch pos d_model"], attacked: Float[Tensor, "batch pos d_model"]
) -> Drift:
    """Compare the perturbed positions of the defended state with the attacked one."""
    pre, pre_after = (watched.pre(x).float().flatten(1) for x in (defended, attacked))
    codes, after = (watched.codes(x).float().flatten(1) for x in (defended, attacked))
    size = codes.norm(dim=1)
    eligible = codes <= 0
    fires = (eligible & (after > 0)).sum(1)
    return Drift(
        pre=(pre_after - pre).norm(dim=1) / pre.norm(dim=1).clamp_min(EPSILON),
        largest=(pre_after - pre).abs().amax(1),
        codes=(after - codes).norm(dim=1) / (size + EPSILON),
        floor=(codes - after).clamp_min(0).norm(dim=1) / (size + EPSILON),
        reactivated=torch.where(eligible.any(1), fires / eligible.sum(1).clamp_min(1), torch.nan),
        silent=size == 0,
    )
