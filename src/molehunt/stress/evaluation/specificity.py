"""The controls without which a recovery says nothing: would the same perturbation have elicited any answer?

1. **random target**: the same attack, aimed at an answer that has nothing to do with the defence. Where that takes no
   longer a perturbation, the attack overrides the model and recovers nothing. The ratio of the two lengths is the
   *specificity gap* of docs/guides/stress.md.
2. **undefended**: the perturbation that elicits the behaviour on clean prompts of the model without the defence. A
   defence that requires no more than that gains nothing.
3. **random perturbation** of the same length, inside the same constraint.
4. **universal perturbation**: the other rows' mean direction at this row's length. Where it works, one vector undoes the
   fix.
"""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.stress.attacks.attack import TINY
from molehunt.stress.attacks.constraint import Constraint


def random_perturbations(
    deltas: Float[Tensor, "batch positions d_model"],
    constraint: Constraint,
    defended: Float[Tensor, "batch positions d_model"],
    seed: int,
) -> Float[Tensor, "batch positions d_model"]:
    """Random directions inside the constraint, each row as long as its own perturbation."""
    noise = torch.randn(deltas.shape, generator=torch.Generator().manual_seed(seed)).to(deltas.device)
    return _as_long(constraint(noise, defended), deltas)


def universal_perturbations(
    deltas: Float[Tensor, "batch positions d_model"], clusters: Sequence[Hashable] | None = None
) -> Float[Tensor, "batch positions d_model"]:
    """For each row the mean direction of all other rows' perturbations, as long as its own.

    Args:
        deltas: perturbation of each row.
        clusters: cluster of each row; the others are then the rows of other clusters. Each row by default.

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


def _as_long(directions: Tensor, deltas: Tensor) -> Tensor:
    """Directions, each as long as its row's perturbation."""
    lengths = deltas.flatten(1).norm(dim=1) / directions.flatten(1).norm(dim=1).clamp_min(TINY)
    return directions * lengths[:, None, None]
