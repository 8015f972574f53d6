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

CLOSE = 1.02
"""Ratio of two medians of ‖ΔW‖/‖W‖ up to which two candidates are too close to tell apart."""
ORDER: dict[Relation, int] = {"related": 0, "identical": 1, "unverified": 2, "unrelated": 3}
"""A copy of the fine-tune comes behind its base: it explains nothing."""


@dataclass(frozen=True, kw_only=True)
class RankedBase:
    """One candidate, and what the weights say of it."""

    folder: str
    name: str
    identity: BaseIdentity
    is_base: bool = False
    """Whether this is the model that was given as BASE."""


def rank_bases(candidates: Sequence[str | Path], tuned: Checkpoint, track: Track = silent) -> tuple[RankedBase, ...]:
    """Every candidate, the likeliest base first: the one from which the weights moved least.

    Args:
        candidates: model folders, hub ids, GGUF files, or folders that hold several model folders; BASE comes first.
        tuned: the fine-tune.
        track: shows progress.

    Raises:
        UsageError: a candidate is no model and holds none.
    """
    found: list[RankedBase] = []
    for place, folder in enumerate(_expanded(candidates, track)):
        name = printable(model_name(folder), 80)
        try:
            identity = base_identity(Checkpoint.open(folder, adapter="ignore"), tuned, track)
        except MolehuntError as error:
            identity = BaseIdentity(relation="unverified", why=f"{name} cannot be read: {str(error).splitlines()[0]}")
        found.append(RankedBase(folder=str(folder), name=name, identity=identity, is_base=place == 0))
    return tuple(sorted(found, key=_key))


def ranking_table(ranked: Sequence[RankedBase]) -> list[str]:
    """One line for each candidate, about 100 columns wide."""
    lines = [
        f"{'candidates, the likeliest base first':<45}{'correlation':>11}{'‖ΔW‖/‖W‖':>11}{'changed':>14}  relation"
    ]
    for one in ranked:
        seen = one.identity
        correlation = "" if seen.correlation is None else f"{seen.correlation:.3f}"
        relative = "" if seen.relative is None else f"{seen.relative:.2g}"
        changed = f"{seen.changed} of {seen.tensors}" if seen.tensors else ""
        lines.append(
            f"{printable(one.name, 44):<45}{correlation:>11}{relative:>11}{changed:>14}  {_relation(one, ranked)}"
        )
    return lines


def nearer_base(ranked: Sequence[RankedBase]) -> str:
    """Name of the likeliest candidate, if it is clearly nearer to the fine-tune than BASE; empty if none is.

    A copy of the fine-tune is never it, and neither are candidates that are too close to tell apart.
    """
    base = next((one for one in ranked if one.is_base), None)
    if base is None or not ranked or ranked[0].is_base or ranked[0].identity.relation != "related":
        return ""
    if any(_close(ranked[0], one) for one in ranked[1:]) or base.identity.relation == "identical":
        return ""
    return ranked[0].name


def _close(one: RankedBase, other: RankedBase) -> bool:
    """Whether two candidates fit, and neither is clearly nearer."""
    if {one.identity.relation, other.identity.relation} != {"related"}:
        return False
    left, right = one.identity.relative, other.identity.relative
    if left is None or right is None:
        return left == right
    return max(left, right) <= CLOSE * min(left, right)


def _relation(one: RankedBase, ranked: Sequence[RankedBase]) -> str:
    """The last column: the relation, or what can be said of an adapter's base."""
    if one.identity.adapter:
        return "does not fit" if one.identity.relation == "unrelated" else "fits in shape"
    close = any(other is not one and _close(one, other) for other in ranked)
    return "related, too close to tell" if close else one.identity.relation


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
