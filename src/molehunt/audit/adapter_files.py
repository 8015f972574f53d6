"""What `files` says of an adapter: of which kind it is, which base it names, whether it loads, and what it changes."""

import copy
from collections.abc import Sequence
from math import isfinite
from statistics import median
from typing import NamedTuple, get_args

from molehunt.audit.weight_samples import nonfinite_said, nonfinite_tensors
from molehunt.checkpoint.adapter_folder import adapter_notes
from molehunt.checkpoint.difference import FolderDifference, Severity
from molehunt.checkpoint.loader_traps import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from molehunt.checkpoint.reader import Checkpoint
from molehunt.checkpoint.skeleton import skeleton
from molehunt.errors import InvalidInput, NotTestable
from molehunt.model.adapter_factors import Factors, LoraChange, OverflowingScale, grown_vocabulary, lora_change
from molehunt.model.adapter_fit import must_fit
from molehunt.model.adapter_placement import (
    MissingTensors,
    UnknownAdapter,
    adapter_config,
    placed_tensors,
    with_adapter,
)
from molehunt.model.blocks import Part, module_role
from molehunt.run.counting import counted


class AdapterReading(NamedTuple):
    """What was seen of an adapter."""

    rows: list[FolderDifference]
    kind: str
    """What it changes, in one sentence; empty where that is not read from its factors."""


def adapter_differences(base: Checkpoint, adapter: Checkpoint) -> AdapterReading:
    """Look at an adapter folder. That PEFT would load all of it onto this base is checked without the base's weights.

    An adapter that loads nothing, or not all, is a finding: whoever tests it tests something else than its author.
    """
    rows = adapter_notes(base.path, adapter.adapter)
    rows += nonfinite_rows("TUNED", ADAPTER_WEIGHTS, nonfinite_tensors(adapter))
    if adapter.adapter.reading == "none":
        return AdapterReading(rows, "")
    change: LoraChange | None = None
    try:
        if adapter.adapter.reading == "factors":
            model = skeleton(base.path)
            change = lora_change(model, adapter.path)
            rows += [
                _row(ADAPTER_WEIGHTS, "saved embedding", "finding", why) for why in grown_vocabulary(model, change)
            ]
        else:
            _check_parts(base, adapter)
    except (InvalidInput, MissingTensors, UnknownAdapter) as error:
        rows.append(_row(ADAPTER_WEIGHTS, "does not load", "finding", str(error)))
    except OverflowingScale as error:
        rows.append(_row(ADAPTER_CONFIG, "scale overflows", "finding", str(error)))
    except NotTestable as error:
        rows.append(_row(ADAPTER_WEIGHTS, "does not load", "note", str(error)))
    return AdapterReading(rows, "" if change is None else _kind(base, change))


def nonfinite_rows(side: str, file: str, names: Sequence[str]) -> list[FolderDifference]:
    """A finding on tensors that hold NaN or infinity; none where there are no such tensors."""
    if not names:
        return []
    why = nonfinite_said(side, names)
    return [_row(file, "NaN or infinity", "finding", why)]


def _check_parts(base: Checkpoint, adapter: Checkpoint) -> None:
    """Let PEFT place the tensors of an adapter whose effect is measured elsewhere, on a base without weights.

    Raises MissingTensors where the file lacks some. Kinds that PEFT cannot build without weights are not judged here.
    """
    config = adapter_config(adapter.path)
    plain = skeleton(base.path)
    must_fit(plain, adapter.path)
    try:
        model = with_adapter(copy.deepcopy(plain), config, adapter.path)
    except Exception:  # what begins from the base's weights fails without them, in ways of its own
        return
    placed_tensors(model, adapter.path)


def _kind(base: Checkpoint, change: LoraChange) -> str:
    """What a LoRA adapter changes, as for full weights: how many matrices, in which modules and layers, and its rank."""
    sizes = {one.parameter: _norm(one) for one in change.factors}
    acting = [one for one in change.factors if sizes[one.parameter]]
    beside = len(change.replaced) + len(change.added)
    if not acting and not beside:
        return f"This adapter changes nothing: B is zero in all of its {counted(len(sizes), 'pair')} of factors, as before training."
    roles = [role for one in acting if (role := module_role(one.parameter, base.model_type)) is not None]
    parts = sorted({role.part for role in roles}, key=get_args(Part).index)
    layers = len({role.layer for role in roles})
    named = [f"{', '.join(parts)} in {counted(layers, 'layer')}"] if parts else []
    others = len(acting) - len(roles)
    named += [f"{counted(others, 'other matrix', 'other matrices')}"] if others else []
    finite = [size for size in sizes.values() if size and isfinite(size)]
    ranks = sorted({int(one.a.shape[0]) for one in acting})
    rank = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
    zero = len(sizes) - len(acting)
    text = f"LoRA of {rank} changes {counted(len(acting), 'matrix', 'matrices')}" + (
        f" ({'; '.join(named)}), ‖ΔW‖ {median(finite):.2g} (median)" if finite else ""
    )
    text += f"; B is zero in {zero} more" if zero else ""
    text += f"; {counted(beside, 'tensor')} besides (saved modules, biases)" if beside else ""
    return f"{text}."


def _norm(one: Factors) -> float:
    """‖scale · B A‖ from the factors alone: ‖B A‖² = tr(BᵀB · AAᵀ)."""
    a, b = one.a.double(), one.b.double()
    return abs(one.scale) * float(((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0).sqrt())


def _row(file: str, key: str, severity: Severity, why: str) -> FolderDifference:
    return FolderDifference(file=file, key=key, base="", tuned="", severity=severity, why=" ".join(why.split()))
