"""Compare every tensor of a pair, one at a time, and keep the directions of those that changed measurably."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from molehunt.audit.weight_comparison import WRITERS, TensorRow, WeightComparison
from molehunt.checkpoint.adapter import PREFIX, Factors, lora_factors, other_tensors
from molehunt.checkpoint.noise_floor import noise_floor
from molehunt.checkpoint.reader import Checkpoint, paired_names
from molehunt.direction.direction import Directions
from molehunt.direction.weight import (
    change_directions,
    difference_norm,
    frobenius_norm,
    lora_directions,
    subtract_,
    widened,
)
from molehunt.errors import InvalidInput, MolehuntError, NotTestable, ShapeMismatch, printable
from molehunt.model.blocks import Role, module_role
from molehunt.run.progress import Track, silent
from molehunt.run.unit import Units, unit_key


@dataclass(frozen=True)
class _Settings:
    """What can change a row besides the two tensors."""

    k: int
    roles: tuple[str, ...]
    seed: int


def compare_weights(
    base: str | Path | Checkpoint,
    tuned: str | Path | Checkpoint,
    *,
    k: int = 8,
    roles: Sequence[str] = WRITERS,
    seed: int = 0,
    units: Units | None = None,
    track: Track = silent,
) -> WeightComparison:
    """Compare two checkpoints tensor by tensor; never more than one tensor of each side is in memory.

    Args:
        base: the model before fine-tuning.
        tuned: the fine-tuned model, or a LoRA adapter: that one is read from its factors and never merged.
        k: directions to keep per matrix at most.
        roles: matrices whose directions are kept; the others are compared and rated, too, but keep no vectors.
        seed: seed of the random sketches.
        units: where finished tensors are kept, so that a run that was killed goes on where it stopped.
        track: shows progress.

    Raises:
        ShapeMismatch: a tensor differs in shape by more than a resized vocabulary: this is another model's base.
        InvalidInput: a folder is broken, or `base` is an adapter.
    """
    base, tuned = (c if isinstance(c, Checkpoint) else Checkpoint.open(c) for c in (base, tuned))
    if base.kind != "model":
        raise InvalidInput("The base is an adapter. Give the model that it was trained on.")
    compare = _adapter_rows(base, tuned) if tuned.kind == "adapter" else _tensor_rows(base, tuned)
    settings = _Settings(k, tuple(sorted(roles)), seed)
    inputs = {"base": base.content_hash(), "tuned": tuned.content_hash()} if units else {}
    rows: list[TensorRow] = []
    for name, make in track(compare.items(), "comparing weights", len(compare)):
        if units is None:
            rows.append(make(settings))
        else:
            key = unit_key({"step": "weights", "tensor": name, **asdict(settings)}, inputs)
            rows.append(_unit(units, key, partial(make, settings)))
    rows.sort(key=lambda row: (-1 if row.layer is None else row.layer, row.tensor))
    return WeightComparison(
        k=k,
        seed=seed,
        roles=tuple(roles),
        matrices=tuple(row for row in rows if row.role is not None),
        others=tuple(row for row in rows if row.role is None),
    )


def _unit(units: Units, key: str, make: Callable[[], TensorRow]) -> TensorRow:
    """The row of a finished unit, made now if it is not there."""

    def write(folder: Path) -> None:
        row = make()
        facts = {name: value for name, value in vars(row).items() if name != "directions"}
        (folder / "row.json").write_text(json.dumps(facts, allow_nan=False))
        if row.directions is not None:
            row.directions.save(folder)

    folder = units.run(key, write)
    facts = cast("dict[str, Any]", json.loads((folder / "row.json").read_text()))
    facts["strengths"] = tuple(facts["strengths"])
    directions = Directions.load(folder) if (folder / "directions.json").exists() else None
    return TensorRow(**facts, directions=directions)


def _tensor_rows(base: Checkpoint, tuned: Checkpoint) -> dict[str, Callable[[_Settings], TensorRow]]:
    """Tensor name → its comparison, for two model folders."""
    both, only_base, only_tuned = paired_names(base, tuned)
    found: dict[str, Callable[[_Settings], TensorRow]] = {
        name: partial(_tensor_row, base, tuned, name, name, module_role(name, base.model_type)) for name in both
    }
    missing = dict.fromkeys(only_base, "only in the base") | dict.fromkeys(only_tuned, "only in the fine-tune")
    for name, why in missing.items():
        row = _start(name, module_role(name, base.model_type))
        found[name] = partial(_given, replace(row, status="not testable", why=why))
    return found


def _adapter_rows(base: Checkpoint, adapter: Checkpoint) -> dict[str, Callable[[_Settings], TensorRow]]:
    """Tensor name → its comparison, for a base and a LoRA adapter: most tensors are not even read."""
    roles = {name: module_role(name, base.model_type) for name in base.names()}
    found: dict[str, Callable[[_Settings], TensorRow]] = {
        name: partial(_given, replace(_start(name, role), status="identical", rel_norm=0.0))
        for name, role in roles.items()
    }
    for factors in lora_factors(adapter):
        name = _named_in(base, f"{factors.module}.weight")
        if name not in roles:
            raise InvalidInput(
                f"The adapter changes {printable(factors.module)}, which the base does not have.\n"
                "Give the base that the adapter was trained on."
            )
        found[name] = partial(_adapter_row, base, name, roles[name], factors)
    for theirs in other_tensors(adapter):  # replaced whole: trained biases, modules_to_save
        name = _named_in(base, theirs.removeprefix(PREFIX))
        if name in roles:
            found[name] = partial(_tensor_row, base, adapter, name, theirs, roles[name])
        else:  # an unembedding where the base has a tied one
            found[name] = partial(_given, replace(_start(name, None), status="not testable", why="only in the adapter"))
    return found


def _given(row: TensorRow, settings: _Settings) -> TensorRow:
    """A row that needs no look at the tensor."""
    return row


def _tensor_row(
    base: Checkpoint,
    tuned: Checkpoint,
    name: str,
    theirs: str,
    role: Role | None,
    settings: _Settings,
) -> TensorRow:
    """Compare the base's tensor `name` with the tuned side's `theirs`."""
    row, shape, shape_after = _start(name, role), base.shape(name), tuned.shape(theirs)
    if shape != shape_after:
        if role is None and shape[1:] == shape_after[1:]:
            why = f"{shape[0]} rows became {shape_after[0]}"  # a resized vocabulary
            return replace(row, status="not testable", why=why)
        raise ShapeMismatch(name, shape, shape_after)
    try:
        before, after = _numbers(base.tensor(name)), _numbers(tuned.tensor(theirs))
    except (NotTestable, InvalidInput) as error:  # quantised beyond recovery; NaN or infinity
        return replace(row, status="not testable", why=_reason(error, name))
    if torch.equal(before, after):
        return replace(row, status="identical", rel_norm=0.0)
    size = frobenius_norm(before)
    if role is None or before.ndim != 2 or min(before.shape) < 2:
        return _changed(replace(row, layer=None, role=None), difference_norm(before, after), size)
    floor = math.hypot(noise_floor(before, base.dtype(name)), noise_floor(after, tuned.dtype(theirs)))
    dtype = before.dtype
    del before  # read again below: with the difference in float32, three would be in memory
    change = widened(after, dtype)
    del after
    subtract_(change, _numbers(base.tensor(name)))
    change = change.mT if role.transposed else change
    found = change_directions(change, k=settings.k, floor=floor, name=name, seed=settings.seed)
    return _rated(row, found, size, settings.roles)


def _numbers(stored: Tensor) -> Tensor:
    """Integers, booleans and fp8 as float32, which has the arithmetic that they lack."""
    plain = stored.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return stored if plain else stored.to(torch.float32)


def _adapter_row(
    base: Checkpoint,
    name: str,
    role: Role | None,
    factors: Factors,
    settings: _Settings,
) -> TensorRow:
    row, shape = _start(name, role), base.shape(name)
    shape = shape[::-1] if role is not None and role.transposed else shape
    product = (factors.b.shape[0], factors.a.shape[1])
    if shape != product:
        raise ShapeMismatch(name, shape, product)
    try:
        size = frobenius_norm(_numbers(base.tensor(name)))
    except (NotTestable, InvalidInput) as error:
        return replace(row, status="not testable", why=_reason(error, name))
    found = lora_directions(factors.b, factors.a, factors.scale, k=settings.k, name=name)
    return _rated(row, found, size, settings.roles) if role is not None else _changed(row, found.norm, size)


def _reason(error: MolehuntError, name: str) -> str:
    """The error's first line without the name, which the row says."""
    return str(error).partition("\n")[0].removeprefix(f"{printable(name)} ")


def _start(name: str, role: Role | None) -> TensorRow:
    return TensorRow(
        tensor=name, layer=role.layer if role else None, role=role.part if role else None, status="changed"
    )


def _rated(row: TensorRow, found: Directions, size: float, roles: Sequence[str]) -> TensorRow:
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


def _changed(row: TensorRow, norm: float, size: float) -> TensorRow:
    """The row of a tensor that is compared by its norm alone."""
    return replace(row, rel_norm=norm / size if size else None, why="" if size else "all zeros in the base")


def _named_in(base: Checkpoint, name: str) -> str:
    """The base's name for an adapter's tensor: a folder names it with or without the model's own prefix."""
    return next((known for known in base.names() if known == name or name.endswith(f".{known}")), name)
