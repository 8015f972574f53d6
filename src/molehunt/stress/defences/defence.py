"""A defence that is attacked, made from a clamp on latents or from a fix."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Intervention
from molehunt.errors import UsageError
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.steer.fix import Fix
from molehunt.stress.attacks.constraint import Constraint, Exact, Free, Orthogonal, Paper
from molehunt.stress.defences.watched import WatchedLatents, WatchedProjections, WatchedValues


@dataclass(frozen=True, eq=False, kw_only=True)
class Defence:
    """A fix, and the values that it is meant to keep in place."""

    edits: tuple[Intervention, ...]
    site: Site
    """Where the attack enters, after the edits there: the output of a block."""
    watched: WatchedValues
    constraints: tuple[Constraint, ...]
    """One constraint for each arm, such as `Free`, `Paper`, `Exact`. The verdict is about the last."""


def clamp_defence(clamp: Clamp) -> Defence:
    """A clamp, attacked without a constraint, with the published one, and with the exact one.

    Raises UsageError for a clamp that is not at a block's output.
    """
    if clamp.site.stream != "resid":
        raise UsageError(
            f"this dictionary is of {clamp.site}, and an attack enters at a block's output.\n"
            "Give one of a residual stream."
        )
    return Defence(
        edits=(clamp,),
        site=clamp.site,
        watched=WatchedLatents(clamp.dictionary, clamp.latents),
        constraints=(
            Free(),
            Paper(clamp.dictionary, clamp.latents),
            Exact(clamp.dictionary, clamp.latents),
        ),
    )


def fix_defence(fix: Fix) -> Defence:
    """A fix, attacked after its deepest edit: freely, and without moving any projection that the edits there decide.

    Raises UsageError for a fix that ends elsewhere than at a block's output, or an edit without directions.
    """
    site = max(edit.site for edit in fix.interventions)
    if site.stream != "resid":
        raise UsageError(f"this fix ends at {site}, and an attack enters at a block's output.")
    directions = torch.cat([_directions(edit) for edit in fix.interventions if edit.site == site])
    return Defence(
        edits=fix.interventions,
        site=site,
        watched=WatchedProjections(directions),
        constraints=(Free(), Orthogonal(directions)),
    )


def _directions(edit: Intervention) -> Float[Tensor, "k d_model"]:
    for name in ("directions", "direction"):
        found = getattr(edit, name, None)
        if isinstance(found, Tensor):
            return found.float().reshape(-1, found.shape[-1])
    raise UsageError(f"{type(edit).__name__} has no directions that an attack could be constrained to avoid.")
