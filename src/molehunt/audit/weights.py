"""Compare every tensor of a pair, one at a time, and keep the directions of those that changed measurably."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from molehunt.audit.weight_comparison import WRITERS, TensorRow, WeightComparison
from molehunt.checkpoint.adapter import lora_factors
from molehunt.checkpoint.noise_floor import noise_floor
from molehunt.checkpoint.reader import Checkpoint
from molehunt.direction.direction import Directions
from molehunt.direction.weight import (
    change_directions,
    difference,
    difference_norm,
    frobenius_norm,
    lora_directions,
)
from molehunt.errors import InvalidInput, NotTestable, ShapeMismatch, printable
from molehunt.model.blocks import Role, module_role
from molehunt.run.progress import Track, silent
from molehunt.run.unit import Units, unit_key


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
        seed: of the random sketches.
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
    settings = {"step": "weights", "k": k, "roles": sorted(roles), "seed": seed}
    inputs = {"base": base.content_hash(), "tuned": tuned.content_hash()} if units else {}
    rows: list[TensorRow] = []
    for name, make in track(compare.items(), "comparing weights", len(compare)):
        asked = partial(make, k=k, roles=roles, seed=seed)
        rows.append(_unit(units, unit_key({**settings, "tensor": name}, inputs), asked) if units else asked())
    rows.sort(key=lambda row: (-1 if row.layer is None else row.layer, row.tensor))
    return WeightComparison(
        k=k,
        seed=seed,
        roles=tuple(roles),
        matrices=tuple(row for row in rows if row.role is not None),
        others=tuple(row for row in rows if row.role is None),
    )


class _Compare(Protocol):
    def __call__(self, *, k: int, roles: Sequence[str], seed: int) -> TensorRow: ...


def _unit(units: Units, key: str, make: Callable[[], TensorRow]) -> TensorRow:
    """The row of a finished unit, made now if it is not there."""

    def write(folder: Path) -> None:
        row = make()
        facts = {name: value for name, value in vars(row).items() if name != "directions"}
        (folder / "row.json").write_text(json.dumps(facts, allow_nan=False))
        if row.directions is not None:
            row.directions.save(folder)

    folder = units.run(key, write)
    facts = json.loads((folder / "row.json").read_text())
    directions = Directions.load(folder) if (folder / "directions.json").exists() else None
    return TensorRow(**{**facts, "strengths": tuple(facts["strengths"])}, directions=directions)


def _tensor_rows(base: Checkpoint, tuned: Checkpoint) -> dict[str, _Compare]:
    """Tensor name → its comparison, for two model folders."""
    model_type = base.model_type
    names = dict.fromkeys((*base.names(), *tuned.names()))
    return {name: partial(_tensor_row, base, tuned, name, module_role(name, model_type)) for name in names}


def _tensor_row(
    base: Checkpoint, tuned: Checkpoint, name: str, role: Role | None, *, k: int, roles: Sequence[str], seed: int
) -> TensorRow:
    row = _start(name, role)
    for side, there in (("fine-tune", base), ("base", tuned)):
        if name not in there.names():
            return replace(row, status="not testable", why=f"only in the {side}")
    try:
        before, after = base.tensor(name), tuned.tensor(name)
        if before.shape != after.shape:
            if role is None and before.shape[1:] == after.shape[1:]:  # the vocabulary was resized
                return replace(row, status="not testable", why=f"{len(before)} rows became {len(after)}")
            raise ShapeMismatch(name, tuple(before.shape), tuple(after.shape))
        if torch.equal(before, after):
            return replace(row, status="identical", rel_norm=0.0)
        size = frobenius_norm(before)
        if role is None or before.ndim != 2 or min(before.shape) < 2:
            return _changed(replace(row, layer=None, role=None), difference_norm(before, after), size)
        floor = math.hypot(noise_floor(before, base.dtype(name)), noise_floor(after, tuned.dtype(name)))
        change = difference(before, after)
        del before, after  # the difference in float32 is as large as both in bfloat16
        found = change_directions(change.mT if role.transposed else change, k=k, floor=floor, name=name, seed=seed)
    except NotTestable as error:
        return replace(row, status="not testable", why=_reason(error, name))
    return _rated(row, found, size, roles)


def _adapter_rows(base: Checkpoint, adapter: Checkpoint) -> dict[str, _Compare]:
    """Tensor name → its comparison, for a base and a LoRA adapter: most tensors are not even read."""
    model_type = base.model_type
    factors = {_named_in(base, module): rest for module, *rest in lora_factors(adapter)}
    return {
        name: partial(_adapter_row, base, name, module_role(name, model_type), factors.get(name))
        for name in base.names()
    }


def _adapter_row(
    base: Checkpoint,
    name: str,
    role: Role | None,
    factors: tuple[Tensor, Tensor, float] | None,
    *,
    k: int,
    roles: Sequence[str],
    seed: int,
) -> TensorRow:
    row = _start(name, role)
    if factors is None:
        return replace(row, status="identical", rel_norm=0.0)
    b, a, scale = factors
    before = base.tensor(name)
    stored = tuple(before.mT.shape if role is not None and role.transposed else before.shape)
    if stored != (len(b), a.shape[1]):
        raise ShapeMismatch(name, stored, (len(b), a.shape[1]))
    try:
        found = lora_directions(b, a, scale, k=k, name=name)
    except NotTestable as error:
        return replace(row, status="not testable", why=_reason(error, name))
    size = frobenius_norm(before)
    return _rated(row, found, size, roles) if role is not None else _changed(row, found.norm, size)


def _reason(error: NotTestable, name: str) -> str:
    return str(error).removeprefix(f"{printable(name)} ")  # the row says the name


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
    if not math.isfinite(norm):
        return replace(row, status="not testable", why="holds NaN or infinity")
    return replace(row, rel_norm=norm / size if size else None, why="" if size else "all zeros in the base")


def _named_in(base: Checkpoint, module: str) -> str:
    """The base's name for a module's weight: folders name it with or without the model's own prefix."""
    wanted = f"{module}.weight"
    known = {name for name in base.names() if name == wanted or wanted.endswith(f".{name}")}
    if len(known) != 1:
        raise InvalidInput(
            f"The adapter changes {printable(module)}, which the base does not have.\n"
            "Give the base that the adapter was trained on."
        )
    return known.pop()
