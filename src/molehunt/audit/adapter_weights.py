"""The change of every tensor that an adapter makes, as rows of a weight comparison; most tensors are not even read."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from molehunt.audit.adapter_effect import effect_rows
from molehunt.audit.tensor_rows import (
    RowMaker,
    RowSettings,
    changed,
    given,
    numbers,
    rated,
    reason,
    start_row,
    tensor_row,
)
from molehunt.audit.weight_comparison import TensorRow
from molehunt.audit.weight_samples import nonfinite_said, nonfinite_tensors
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.loaded_view import LoadedView
from molehunt.checkpoint.reader import Checkpoint
from molehunt.direction.weight import frobenius_norm, lora_directions
from molehunt.errors import InvalidInput, NotTestable, printable
from molehunt.model.adapter_factors import Factors, LoraChange, lora_change
from molehunt.model.blocks import module_role


def adapter_rows(base: Checkpoint, adapter: Checkpoint) -> dict[str, RowMaker]:
    """Tensor name → its comparison, for a base and an adapter.

    Plain LoRA is read from its factors, exactly and without loading the base. Of every other kind, the base is loaded with
    the adapter, and what it does to each matrix is measured.

    Raises:
        InvalidInput: not all of the adapter would be loaded, or it holds NaN or infinity.
        NotTestable: the adapter is not one of this base, changes no weight, or is of a kind that nothing here knows.
    """
    adapter.adapter.check_readable()
    if broken := nonfinite_tensors(adapter):
        raise InvalidInput(
            f"{nonfinite_said(printable(model_name(adapter.path)), broken)}, and there is no change to measure.\n"
            "Fetch the adapter again, or train it again."
        )
    view = LoadedView.of(base)
    if base.quantisation is None:  # directions of factors need no weight of the base
        view.must_be_complete()
    change = lora_change(view.model, adapter.path) if adapter.adapter.reading == "factors" else None
    found = effect_rows(view, adapter.path) if change is None else _lora_rows(view, change)
    touched = {name for name in view.names() if name in found}
    rows = {name: make for parameter in found.values() for name, make in parameter.items()}
    for name in view.names():
        if name not in touched:
            for stored in view.sources(name):
                row = start_row(stored, module_role(stored, base.model_type))
                rows[stored] = partial(given, replace(row, status="identical", rel_norm=0.0))
    return rows


def shown_name(view: LoadedView, parameter: str) -> str:
    """What a parameter is called in rows: as the base's author called it, where that is one tensor."""
    if parameter not in view.names() or not view.group(parameter).renamed:
        return parameter
    return view.sources(parameter)[0]


def _lora_rows(view: LoadedView, change: LoraChange) -> dict[str, dict[str, RowMaker]]:
    """Parameter → its rows."""
    found: dict[str, dict[str, RowMaker]] = {}

    def put(parameter: str, make: Callable[..., TensorRow], *args: object) -> None:
        found[parameter] = {shown_name(view, parameter): partial(make, view, parameter, *args)}

    for factors in change.factors:
        put(factors.parameter, _factor_row, factors)
    for parameter, tensor in change.replaced.items():
        put(parameter, _replaced_row, tensor)
    for parameter, tensor in change.added.items():
        put(parameter, _added_row, tensor)
    return found


def _factor_row(view: LoadedView, parameter: str, factors: Factors, settings: RowSettings) -> TensorRow:
    name = shown_name(view, parameter)
    role = module_role(name, view.checkpoint.model_type)
    try:
        size, why = _size(view, parameter)
    except InvalidInput as error:
        return replace(start_row(name, role), status="not testable", why=reason(error, parameter))
    found = lora_directions(factors.b, factors.a, factors.scale, k=settings.k, name=name)
    row = start_row(name, role)
    if role is None:
        row = changed(row, found.norm, size) if found.norm else replace(row, status="identical", rel_norm=0.0)
    else:
        row = rated(row, found, size, settings.roles)
    return replace(row, why=why) if why and found.norm else row


def _replaced_row(view: LoadedView, parameter: str, tensor: Tensor, settings: RowSettings) -> TensorRow:
    """A tensor that the adapter puts in the place of the base's."""
    name, ours = shown_name(view, parameter), view.tied.get(parameter, parameter)
    if ours not in view.names():
        return replace(start_row(name, None), status="changed", why="only in the adapter")
    role = module_role(name, view.checkpoint.model_type)
    return tensor_row(view, OneTensor(tensor), ours, parameter, role, settings, shown=name)


def _added_row(view: LoadedView, parameter: str, tensor: Tensor, settings: RowSettings) -> TensorRow:
    """A bias that `lora_bias` adds to the base's, or to none."""
    row, norm = start_row(shown_name(view, parameter), None), frobenius_norm(tensor)
    if not norm:
        return replace(row, status="identical", rel_norm=0.0)
    if parameter not in view.names():
        return replace(row, status="changed", why=f"a bias that the base does not have, of norm {norm:.3g}")
    try:
        size, why = _size(view, parameter)
    except InvalidInput as error:
        return replace(row, status="not testable", why=reason(error, parameter))
    row = changed(row, norm, size)
    return replace(row, why=why) if why else row


def _size(view: LoadedView, parameter: str) -> tuple[float, str]:
    """‖W‖ of the base, and why it is not known: directions of factors need no base. Raises InvalidInput if it holds NaN."""
    ours = view.tied.get(parameter, parameter)
    if ours not in view.names():
        return 0.0, "‖W‖ unknown: it is stored quantised, in a layout that is not read"
    try:
        return frobenius_norm(numbers(view.tensor(ours))), ""
    except NotTestable as error:
        return 0.0, f"‖W‖ unknown: {reason(error, parameter)}"


@dataclass(frozen=True, eq=False)
class OneTensor:
    """A tensor in memory as the one that a comparison reads."""

    value: Tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.value.dtype

    def rounding(self, name: str) -> float:
        return 0.0

    def tensor(self, name: str) -> Tensor:
        """The tensor. Raises InvalidInput when it holds NaN or infinity."""
        if self.value.is_floating_point() and not self.value.isfinite().all():
            raise InvalidInput("holds NaN or infinity: no difference to it means anything.")
        return self.value
