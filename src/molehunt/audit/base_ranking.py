"""Which of several folders a fine-tune was made from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from molehunt.audit.base_identity import BaseIdentity, Relation, base_identity
from molehunt.checkpoint.hub import local_folder
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import MolehuntError, UsageError, printable
from molehunt.run.progress import Track, silent

ORDER: dict[Relation, int] = {"related": 0, "identical": 1, "unverified": 2, "unrelated": 3}
"""A copy of the fine-tune comes behind its base: it explains nothing."""


@dataclass(frozen=True, kw_only=True)
class RankedBase:
    """One candidate, and what the weights say of it."""

    folder: str
    name: str
    identity: BaseIdentity


def rank_bases(candidates: Sequence[str | Path], tuned: Checkpoint, track: Track = silent) -> tuple[RankedBase, ...]:
    """Every candidate, the likeliest base first: the one from which the weights moved least.

    Args:
        candidates: model folders, hub ids, GGUF files, or folders that hold several model folders.
        tuned: the fine-tune.
        track: shows progress.

    Raises:
        UsageError: a candidate is no model and holds none.
    """
    found: list[RankedBase] = []
    for folder in _expanded(candidates, track):
        name = printable(model_name(folder), 80)
        try:
            identity = base_identity(Checkpoint.open(folder, adapter="ignore"), tuned, track)
        except MolehuntError as error:
            identity = BaseIdentity(relation="unverified", why=f"{name} cannot be read: {str(error).splitlines()[0]}")
        found.append(RankedBase(folder=str(folder), name=name, identity=identity))
    return tuple(sorted(found, key=_key))


def ranking_table(ranked: Sequence[RankedBase]) -> list[str]:
    """One line for each candidate, at most 100 columns wide."""
    lines = [
        f"{'candidates, the likeliest base first':<45}{'correlation':>11}{'‖ΔW‖/‖W‖':>11}{'changed':>14}  relation"
    ]
    for one in ranked:
        seen = one.identity
        correlation = "" if seen.correlation is None else f"{seen.correlation:.3f}"
        relative = "" if seen.relative is None else f"{seen.relative:.2g}"
        changed = f"{seen.changed} of {seen.tensors}" if seen.tensors else ""
        lines.append(f"{printable(one.name, 44):<45}{correlation:>11}{relative:>11}{changed:>14}  {seen.relation}")
    return lines


def _key(one: RankedBase) -> tuple[int, float, int, str]:
    seen = one.identity
    none = 0.0 if seen.relation in ("related", "identical") else math.inf
    return ORDER[seen.relation], none if seen.relative is None else seen.relative, seen.changed, one.folder


def _expanded(candidates: Sequence[str | Path], track: Track) -> list[Path]:
    """The model folders that are meant, each once."""
    found: list[Path] = []
    for candidate in candidates:
        folder = local_folder(candidate, track)
        if (folder / "config.json").is_file():
            found.append(folder)
            continue
        inner = sorted(one for one in folder.iterdir() if (one / "config.json").is_file())
        if not inner:
            raise UsageError(f"{printable(str(candidate))} (--bases) is no model folder and holds none.")
        found += inner
    return list(dict.fromkeys(found))
