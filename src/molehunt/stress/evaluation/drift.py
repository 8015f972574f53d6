"""How far an attack moved the values that the defence watches: did the behaviour recover beside the defence, or through it?

Published (arXiv 2606.18322 §4): the change of the codes after the nonlinearity, relative to those of the defended state.
That measure is blind below a threshold, and its denominator grows with the clamp (where it is 0, the measure says
nothing). So the pre-activations stand beside it, and whether anything fired at all. Every perturbed position counts.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from molehunt.stress.defences.watched import WatchedValues

EPSILON = 1e-8


@dataclass(frozen=True, eq=False, kw_only=True)
class WatchedDrift:
    """One number for each row, over all perturbed positions and all watched values."""

    pre: Float[Tensor, " batch"]
    """‖Δ pre-activations‖ / ‖pre-activations‖."""
    largest: Float[Tensor, " batch"]
    """The largest change of one pre-activation, in its own units."""
    codes: Float[Tensor, " batch"]
    """As published: ‖Δ codes‖ / (‖codes‖ + ε)."""
    floor: Float[Tensor, " batch"]
    """As published, clamp-floor violation: ‖[codes before − codes after]₊‖ / (‖codes before‖ + ε)."""
    reactivated: Float[Tensor, " batch"]
    """Share of the silent watched values that fire under the attack; not a number where none was silent."""
    silent: Bool[Tensor, " batch"]
    """No watched value fires in the defended state, so the published drift has nothing to be relative to."""


def drift_of(
    watched: WatchedValues, defended: Float[Tensor, "batch pos d_model"], attacked: Float[Tensor, "batch pos d_model"]
) -> WatchedDrift:
    """Compare the perturbed positions of the defended state with the attacked one."""
    pre, pre_after = (watched.pre(x).float().flatten(1) for x in (defended, attacked))
    codes, after = (watched.codes(x).float().flatten(1) for x in (defended, attacked))
    size = codes.norm(dim=1)
    eligible = codes <= 0
    fires = (eligible & (after > 0)).sum(1)
    return WatchedDrift(
        pre=(pre_after - pre).norm(dim=1) / pre.norm(dim=1).clamp_min(EPSILON),
        largest=(pre_after - pre).abs().amax(1),
        codes=(after - codes).norm(dim=1) / (size + EPSILON),
        floor=(codes - after).clamp_min(0).norm(dim=1) / (size + EPSILON),
        reactivated=torch.where(eligible.any(1), fires / eligible.sum(1).clamp_min(1), torch.nan),
        silent=size == 0,
    )
