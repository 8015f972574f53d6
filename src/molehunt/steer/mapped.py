"""A map between two models as an edit: a block puts out what the map makes of its own activations.

With a map from a fine-tune to its base, both read at one block, this is a switch that turns off what the fine-tune
learnt, and the map the other way round, in the base, turns it on. Source: arXiv 2503.04429, where it is proposed as a
lightweight one; what it costs in capability is not measured there (see `capability`).
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from molehunt.activation.scale import sinks
from molehunt.contracts import Gate, TransferMap
from molehunt.errors import UsageError
from molehunt.model.taps import edit_sites
from molehunt.site import Site
from molehunt.steer.add import gated
from molehunt.steer.scope import token_scope, whole_prompt


@dataclass(frozen=True, eq=False)
class Mapped:
    """(1 − strength) · acts + strength · map(acts), at every token that the gate lets through."""

    site: Site
    map: TransferMap
    """A map from this site of the model that runs to the same site of another."""
    strength: float | int = 1.0
    gate: Gate | None = None

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Raises UsageError for a map between other widths."""
        if self.strength == 0:
            return acts
        mapped = self.map(acts.reshape(-1, acts.shape[-1]))
        if mapped.shape[-1] != acts.shape[-1]:
            raise UsageError(
                f"this map leads to {mapped.shape[-1]} dimensions, and activations at {self.site} have {acts.shape[-1]}: a "
                "model can only be given what is as wide as its own."
            )
        return gated(acts, torch.lerp(acts.float(), mapped.float().reshape(acts.shape), self.strength), self.gate)


@contextmanager
def switched(
    model: nn.Module, map: TransferMap, strength: float | int = 1.0, *, layers_path: str | None = None
) -> Generator[None, None, None]:
    """In every pass inside the block, the map's site puts out what the map makes of it, in prompts and in cached steps.

    The first token of a prompt and its attention sinks keep their own: no map is fitted to them.

    Args:
        model: a causal language model, in a PEFT wrapper or not.
        map: from a site of this model to the same site of another.
        strength: 1 replaces, 0 changes nothing.
        layers_path: see `decoder_blocks`.

    Raises:
        UsageError: a map from one site to another.
        CannotTap: the model has no such site (see `edit_sites`).
    """
    if map.source != map.target:
        raise UsageError(
            f"this map leads from {map.source} to {map.target}: a switch takes a block of one model to the same block of "
            "the other.\nFit one with equal --from-layer and --to-layer."
        )
    with token_scope(model, whole_prompt, generation=True) as scope:

        def content(acts: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
            where = scope(acts)
            return where if scope.chosen is None else where & ~sinks(acts, where)

        with edit_sites(model, [Mapped(map.source, map, strength, content)], layers_path=layers_path):
            yield
