"""One row of a weight comparison: how a tensor, or a change of one, is rated."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from molehunt.audit.weight_comparison import TensorRow
from molehunt.checkpoint.noise_floor import noise_floor, within_rounding
from molehunt.direction.direction import Directions
from molehunt.direction.weight import change_directions, difference_norm, frobenius_norm, subtract_, widened
from molehunt.errors import InvalidInput, MolehuntError, NotTestable, ShapeMismatch, printable
from molehunt.model.blocks import Role

_IN_A_BLOCK = re.compile(r"\.(layers|layer|h|blocks)\.\d+\.")


@runtime_checkable
class TensorSource(Protocol):
    """Where a tensor is read from: a checkpoint, a view of one as it is loaded, or one expert's matrix."""

    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def rounding(self, name: str) -> float: ...
    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class RowSettings:
    """What can change a row besides the two tensors."""

    k: int
    roles: tuple[str, ...]
    seed: int


RowMaker = Callable[[RowSettings], TensorRow]
"""Makes the row of one tensor; the tensor is read then, and not before."""


def given(row: TensorRow, settings: RowSettings) -> TensorRow:
    """A row that needs no look at the tensor."""
    return row


def tensor_row(
    base: TensorSource,
    tuned: TensorSource,
    name: str,
    theirs: str,
    role: Role | None,
    settings: RowSettings,
    *,
    shown: str = "",
) -> TensorRow:
    """Compare the base's tensor `name` with the tuned side's `theirs`; the row is called `shown`, or `name` without it.

    Raises ShapeMismatch unless the shapes are equal, or differ in the rows of a vocabulary alone.
    """
    row, shape, shape_after = start_row(shown or name, role), base.shape(name), tuned.shape(theirs)
    if shape != shape_after:
        for side, stored in ((base, name), (tuned, theirs)):
            if why := _unreadable(side, stored):  # packed numbers have another shape than the weight that they encode
                return replace(row, status="not testable", why=why)
        if role is not None or shape[1:] != shape_after[1:] or _IN_A_BLOCK.search(name):
            raise ShapeMismatch(name, shape, shape_after)
        return _resized(base, tuned, name, theirs, row)
    try:
        before, after = numbers(base.tensor(name)), numbers(tuned.tensor(theirs))
    except (NotTestable, InvalidInput) as error:  # quantised beyond recovery; NaN or infinity
        return replace(row, status="not testable", why=reason(error, name))
    if torch.equal(before, after):
        return replace(row, status="identical", rel_norm=0.0)
    size = frobenius_norm(before)
    quantised = math.hypot(base.rounding(name), tuned.rounding(theirs))
    matrix = before.ndim == 2 and min(before.shape) > 1
    if not matrix and within_rounding(before, base.dtype(name), after, tuned.dtype(theirs)):
        rel = difference_norm(before, after) / size if size else None
        return replace(row, layer=None, role=None, status="below noise floor", rel_norm=rel)
    if not matrix or (role is None and not quantised):
        return changed(replace(row, layer=None, role=None), difference_norm(before, after), size)
    floor = math.hypot(noise_floor(before, base.dtype(name)), noise_floor(after, tuned.dtype(theirs)), quantised)
    dtype = before.dtype
    del before  # read again below: with the difference in float32, three would be in memory
    change = widened(after, dtype)
    del after
    subtract_(change, numbers(base.tensor(name)))
    change = change.mT if role is not None and role.transposed else change
    found = change_directions(
        change, k=settings.k if role is not None else 1, floor=floor, name=row.tensor, seed=settings.seed
    )
    return rated(row, found, size, settings.roles)


def finite_row(row: TensorRow) -> TensorRow:
    """`row`, or one that says why it is not testable if a number in it is NaN or infinity: the values are too large for it."""
    found = row.directions
    numbers_of = (row.rel_norm, row.floor, row.z, *row.strengths, None if found is None else found.remainder)
    whole = found is None or all(
        bool(v.isfinite().all()) for v in (found.share, found.residual, found.write, found.read)
    )
    if whole and all(number is None or math.isfinite(number) for number in numbers_of):
        return row
    why = "its values are so large that their difference overflows"
    return replace(start_row(row.tensor, None), layer=row.layer, role=row.role, status="not testable", why=why)


def _unreadable(side: TensorSource, name: str) -> str:
    """Why the values of a tensor are not given back; empty if they are."""
    try:
        side.tensor(name)
    except NotTestable as error:
        return reason(error, name)
    except InvalidInput:
        return ""
    return ""


def _resized(base: TensorSource, tuned: TensorSource, name: str, theirs: str, row: TensorRow) -> TensorRow:
    """Compare the rows that both vocabularies have, and name how many were added or taken away."""
    before, after = base.shape(name)[0], tuned.shape(theirs)[0]
    extra = f"{abs(after - before)} rows {'added' if after > before else 'taken away'}"
    try:
        one, other = (numbers(side.tensor(n))[: min(before, after)] for side, n in ((base, name), (tuned, theirs)))
    except (NotTestable, InvalidInput) as error:
        return replace(row, status="not testable", why=f"{extra}; {reason(error, name)}")
    norm, size = difference_norm(one, other), frobenius_norm(one)
    shared = "the others are identical" if torch.equal(one, other) else "the others changed, too"
    return replace(row, status="changed", rel_norm=norm / size if size else None, why=f"{extra}; {shared}")


def numbers(stored: Tensor) -> Tensor:
    """Integers, booleans and fp8 as float32, which has the arithmetic that they lack."""
    plain = stored.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return stored if plain else stored.to(torch.float32)


def reason(error: MolehuntError, name: str) -> str:
    """The error's first line without the name, which the row says."""
    return str(error).partition("\n")[0].removeprefix(f"{printable(name)} ")


def start_row(name: str, role: Role | None) -> TensorRow:
    return TensorRow(
        tensor=name, layer=role.layer if role else None, role=role.part if role else None, status="changed"
    )


def rated(row: TensorRow, found: Directions, size: float, roles: Sequence[str]) -> TensorRow:
    """The row of a matrix with what was found in it."""
    return replace(
        row,
        status="changed" if len(found.strength) else "below noise floor" if found.norm else "identical",
        rel_norm=found.norm / size if size else None,
        floor=found.floor,
        strengths=tuple(found.strength.tolist()),
        z=float(found.z[0]) if len(found.strength) else None,
        directions=found if row.role in roles else None,
    )


def changed(row: TensorRow, norm: float, size: float) -> TensorRow:
    """The row of a tensor that is compared by its norm alone."""
    return replace(row, rel_norm=norm / size if size else None, why="" if size else "all zeros in the base")
