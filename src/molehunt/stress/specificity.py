"""The controls without which "it came back" says nothing: would the same push have brought anything back?

1. **random target**: the same attack, asked for an answer that the defence never had to do with. Where that takes no
   longer a push, the attack overrides the model and recovers nothing (the *specificity gap*, §1.7 F6 of the notes).
2. **undefended**: the push that brings the behaviour out of the model without the defence where it is not shown. A
   defence that asks for no more than that gains nothing.
3. **random push** of the same length, inside the same constraint.
4. **universal push**: the other rows' mean direction at this row's length. Where it works, one vector undoes the fix.
"""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.stress.attack import TINY
from molehunt.stress.constraint import Constraint


def random_pushes(
    deltas: Float[Tensor, "batch positions d_model"],
    constraint: Constraint,
    defended: Float[Tensor, "batch positions d_model"],
    seed: int,
) -> Float[Tensor, "batch positions d_model"]:
    """Random directions inside the constraint, each row as long as its own perturbation."""
    noise = torch.randn(deltas.shape, generator=torch.Generator().manual_seed(seed)).to(deltas.device)
    return _as_long(constraint(noise, defended), deltas)


def universal_pushes(
    deltas: Float[Tensor, "batch positions d_model"], clusters: Sequence[Hashable] | None = None
) -> Float[Tensor, "batch positions d_model"]:
    """For each row the mean direction of all others' perturbations, as long as its own.

    Args:
        deltas: of each row.
        clusters: which rows belong together; the others are then those of other clusters.

    Raises:
        ValueError: no row has others.
    """
    names = list(range(len(deltas))) if clusters is None else list(clusters)
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if len(place) < 2:
        raise ValueError("the mean of the others needs two rows or more, of two clusters")
    own = torch.tensor([place[name] for name in names], device=deltas.device)
    units = deltas / deltas.flatten(1).norm(dim=1).clamp_min(TINY)[:, None, None]
    sums = torch.zeros(len(place), *deltas.shape[1:], dtype=units.dtype, device=deltas.device).index_add(0, own, units)
    return _as_long(units.sum(0, keepdim=True) - sums[own], deltas)


def _as_long(pushes: Tensor, deltas: Tensor) -> Tensor:
    lengths = deltas.flatten(1).norm(dim=1) / pushes.flatten(1).norm(dim=1).clamp_min(TINY)
    return pushes * lengths[:, None, None]
