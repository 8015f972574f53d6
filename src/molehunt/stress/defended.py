"""What is attacked, from the fixes that there are: latents under a clamp, directions that a fix takes out."""

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Intervention
from molehunt.errors import UsageError
from molehunt.steer.clamp import Clamp
from molehunt.steer.fix import Fix
from molehunt.stress.constraint import Exact, Free, Orthogonal, Paper
from molehunt.stress.drift import Latents, Projections
from molehunt.stress.study import Defence


def clamped(clamp: Clamp) -> Defence:
    """Attacked without a constraint, with the published one, and with the exact one. Raises UsageError off block outputs."""
    if clamp.site.stream != "resid":
        raise UsageError(
            f"this dictionary is of {clamp.site}, and an attack enters at a block's output.\n"
            "Give one of a residual stream."
        )
    return Defence(
        edits=(clamp,),
        site=clamp.site,
        watched=Latents(clamp.dictionary, clamp.latents),
        constraints=(
            Free(),
            Paper(clamp.dictionary, clamp.latents),
            Exact(clamp.dictionary, clamp.latents),
        ),
    )


def fixed(fix: Fix) -> Defence:
    """Attacked after its deepest edit, freely and without moving any projection that the edits there decide."""
    site = max(edit.site for edit in fix.interventions)
    if site.stream != "resid":
        raise UsageError(f"this fix ends at {site}, and an attack enters at a block's output.")
    directions = torch.cat([_directions(edit) for edit in fix.interventions if edit.site == site])
    return Defence(
        edits=fix.interventions,
        site=site,
        watched=Projections(directions),
        constraints=(Free(), Orthogonal(directions)),
    )


def _directions(edit: Intervention) -> Float[Tensor, "k d_model"]:
    for name in ("directions", "direction"):
        found = getattr(edit, name, None)
        if isinstance(found, Tensor):
            return found.float().reshape(-1, found.shape[-1])
    raise UsageError(f"{type(edit).__name__} has no directions that an attack could be held to.")
