"""Compare every tensor of a pair, one at a time, and keep the directions of those that changed measurably."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from molehunt.audit.adapter_weights import adapter_rows
from molehunt.audit.loaded_rows import loaded_rows
from molehunt.audit.tensor_rows import RowMaker, RowSettings, finite_row, given, start_row, tensor_row
from molehunt.audit.weight_comparison import WRITERS, TensorRow, WeightComparison
from molehunt.checkpoint.hub import local_folder
from molehunt.checkpoint.loaded_view import loaded_views
from molehunt.checkpoint.reader import Checkpoint, paired_names
from molehunt.direction.direction import Directions
from molehunt.errors import InvalidInput, NotTestable, printable
from molehunt.model.blocks import module_role
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
        tuned: the fine-tuned model, or an adapter: plain LoRA is read from its factors, other kinds from their
            effect on the loaded base.
        k: directions to keep per matrix at most.
        roles: matrices whose directions are kept; the others are compared and rated, too, but keep no vectors.
        seed: seed of the random sketches.
        units: where finished tensors are kept, so that a run that was killed goes on where it stopped.
        track: shows progress.

    Raises:
        ShapeMismatch: a tensor differs in shape by more than a resized vocabulary: this is another model's base.
        InvalidInput: a folder is broken, or `base` is an adapter.
    """
    base, tuned = (c if isinstance(c, Checkpoint) else Checkpoint.open(local_folder(c)) for c in (base, tuned))
    if base.kind != "model":
        raise InvalidInput("The base is an adapter. Give the model that it was trained on.")
    compare = adapter_rows(base, tuned) if tuned.kind == "adapter" else _tensor_rows(base, tuned)
    settings = RowSettings(k, tuple(sorted(roles)), seed)
    inputs = {"base": base.content_hash(), "tuned": tuned.content_hash()} if units else {}
    rows: list[TensorRow] = []
    for name, make in track(compare.items(), "comparing weights", len(compare)):
        if units is None:
            rows.append(_made(make, settings))
        else:
            key = unit_key({"step": "weights", "tensor": name, **asdict(settings)}, inputs)
            rows.append(_unit(units, key, partial(_made, make, settings)))
    rows.sort(key=lambda row: (-1 if row.layer is None else row.layer, row.tensor))
    return WeightComparison(
        k=k,
        seed=seed,
        roles=tuple(roles),
        matrices=tuple(row for row in rows if row.role is not None),
        others=tuple(row for row in rows if row.role is None),
    )


def _made(make: RowMaker, settings: RowSettings) -> TensorRow:
    """A row, in which every number is finite."""
    try:
        return finite_row(make(settings))
    except torch.linalg.LinAlgError as error:
        raise NotTestable(f"a difference of two tensors has no directions: {printable(str(error))}") from error


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


def _tensor_rows(base: Checkpoint, tuned: Checkpoint) -> dict[str, RowMaker]:
    """Tensor name → its comparison, for two model folders: as loaders take them, where transformers knows the model."""
    views = loaded_views(base, tuned)
    if views is None:
        return _stored_rows(base, tuned)
    for view in views:
        view.must_be_complete()
    return loaded_rows(*views)


def _stored_rows(base: Checkpoint, tuned: Checkpoint) -> dict[str, RowMaker]:
    """Rows by stored names alone, for an architecture that transformers does not know."""
    both, only_base, only_tuned = paired_names(base, tuned)
    found: dict[str, RowMaker] = {
        name: partial(tensor_row, base, tuned, name, name, module_role(name, base.model_type)) for name in both
    }
    missing = dict.fromkeys(only_base, "only in the base") | dict.fromkeys(only_tuned, "only in the fine-tune")
    for name, why in missing.items():
        row = start_row(name, module_role(name, base.model_type))
        found[name] = partial(given, replace(row, status="not testable", why=why))
    return found
