"""Compare two folders as loaders would read them; no weight is read and no model is run."""

import filecmp
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from molehunt.audit.adapter_files import adapter_differences
from molehunt.audit.base_identity import BaseIdentity, base_identity
from molehunt.audit.base_ranking import RankedBase, rank_bases, ranking_table
from molehunt.audit.stored_tensors import tensor_differences
from molehunt.checkpoint.difference import FolderDifference, Severity
from molehunt.checkpoint.folder_diff import folder_differences
from molehunt.checkpoint.gguf_facts import conversion_facts, formats
from molehunt.checkpoint.hub import local_folder
from molehunt.checkpoint.loader_traps import Trap
from molehunt.checkpoint.reader import AdapterChoice, Checkpoint
from molehunt.errors import InvalidInput, printable
from molehunt.run.progress import Track, busy, silent


@dataclass(frozen=True, kw_only=True)
class FolderComparison:
    """Differences between two folders and ways in which loaders may disagree about either."""

    rows: tuple[FolderDifference, ...]
    base_sha256: str
    tuned_sha256: str
    tensors: int
    """Number of tensors that were compared by shape and dtype."""
    identity: BaseIdentity | None = None
    """Whether the base is the fine-tune's, and what kind of fine-tune it is."""
    bases: tuple[RankedBase, ...] = ()
    """The candidates that were asked for and the base, the likeliest one first."""

    @property
    def findings(self) -> int:
        """Rows that change output without a weight change, or that loaders disagree on."""
        return sum(row.severity == "finding" for row in self.rows)

    @property
    def verdict(self) -> str:
        """NOT TESTABLE against a base that is another model's; FLAGGED-CORRELATIONAL when there is a finding."""
        if self._wrong_base:
            return "NOT TESTABLE"
        return "FLAGGED-CORRELATIONAL" if self.findings else "NO FINDING"

    @property
    def exit_code(self) -> int:
        """3 against a wrong base, 1 when flagged, else 0."""
        return 3 if self._wrong_base else 1 if self.findings else 0

    @property
    def _wrong_base(self) -> bool:
        return self.identity is not None and self.identity.relation == "unrelated"

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        header: dict[str, Any] = {"schema_version": 1, "verdict": self.verdict, "exit_code": self.exit_code}
        return json.dumps({**header, **asdict(self)}, indent=2, ensure_ascii=False)

    def to_table(self) -> str:
        """A table for people, at most 100 columns wide."""
        lines = [self._headline(), ""]
        if self.identity is not None:
            lines += [*(line for said in self.identity.lines() for line in wrap(said, 100)), ""]
        if self.bases:
            lines += [*ranking_table(self.bases), ""]
        for row in self.rows:
            lines.append(printable(f"{row.severity:<8} {row.file}: {row.key}", 100))
            lines.append(f"         {printable(row.why, 90)}")
            if row.base or row.tuned:
                lines.append(f"         base:  {printable(row.base, 83)}")
                lines.append(f"         tuned: {printable(row.tuned, 83)}")
        return "\n".join(lines).rstrip()

    def _headline(self) -> str:
        """The verdict and what it counts."""
        counted = f"{self.findings} findings and {len(self.rows) - self.findings} notes"
        if self._wrong_base:
            return f"{self.verdict}: BASE is another model's base, so nothing here says what TUNED changed ({counted})"
        if not self.rows:
            return f"{self.verdict}: {self.tensors} tensors agree in name, shape and dtype; no other file differs."
        return f"{self.verdict}: {counted}"


def compare_folders(
    base: str | Path,
    tuned: str | Path,
    *,
    adapter: AdapterChoice = "refuse",
    bases: Sequence[str | Path] = (),
    track: Track = silent,
) -> FolderComparison:
    """Compare two folders in everything but the values of single weights, which say whether the base is the right one.

    Args:
        base: folder, hub id or GGUF file of the model before fine-tuning.
        tuned: that of the fine-tune or its adapter.
        adapter: see `Checkpoint.open`.
        bases: further candidates for the base, which are ranked with it.
        track: shows progress.

    Raises:
        InvalidInput: a folder is broken or refused, or the base is an adapter.
        ShapeMismatch: a tensor differs in shape, and most others do not.
        UsageError: a folder is missing, or `adapter` must be given.
        NotTestable: a quantisation that is not known.
    """
    left = Checkpoint.open(local_folder(base, track))
    right = Checkpoint.open(local_folder(tuned, track), adapter=adapter)
    if left.kind != "model":
        raise InvalidInput("The base is an adapter. Give the model that it was trained on.")
    identity = base_identity(left, right, track)
    rows = _trap_rows(left, right) + _conversion_rows(left, right)
    tensors = 0
    if identity.relation == "unrelated":
        tensors = identity.tensors
    elif right.kind == "model":
        tensors, found = tensor_differences(left, right, track)
        rows += found
    else:
        rows += adapter_differences(left, right)
    rows += folder_differences(left.path, right.path)
    rows.sort(key=lambda row: row.severity != "finding")
    with busy(track, "hashing both folders"):
        hashes = left.content_hash(), right.content_hash()
    return FolderComparison(
        rows=tuple(rows),
        base_sha256=hashes[0],
        tuned_sha256=hashes[1],
        tensors=tensors,
        identity=identity,
        bases=rank_bases([left.path, *bases], right, track) if bases else (),
    )


def _conversion_rows(base: Checkpoint, tuned: Checkpoint) -> list[FolderDifference]:
    """What is to be known of folders that were converted from GGUF files."""
    rows: list[FolderDifference] = []
    for side, checkpoint in (("base", base), ("tuned", tuned)):
        if facts := conversion_facts(checkpoint.path):
            left_out = f"; not read by transformers: {', '.join(facts['unread'][:5])}" if facts["unread"] else ""
            values = {side: f"{facts['file']} ({formats(facts)})"}
            why = f"the {side} side was read from a GGUF file: changes within its rounding are not testable{left_out}"
            row = {"base": "", "tuned": "", **values}
            rows.append(FolderDifference(file="tensors", key="quantisation", severity="note", why=why, **row))
    return rows


def _trap_rows(base: Checkpoint, tuned: Checkpoint) -> list[FolderDifference]:
    """What loaders may read differently. What only the base has, or both share unchanged, accuses nobody."""
    shared = [trap for trap in tuned.findings if trap in base.findings and _same_file(base.path, tuned.path, trap.file)]
    rows = [_trap_row("both folders", trap, "note", "; both folders share it unchanged") for trap in shared]
    rows += [_trap_row("base folder", trap, "note", "") for trap in base.findings if trap not in shared]
    rows += [_trap_row("tuned folder", trap, trap.severity, "") for trap in tuned.findings if trap not in shared]
    return rows


def _trap_row(side: str, trap: Trap, severity: Severity, more: str) -> FolderDifference:
    return FolderDifference(file=side, key=trap.kind, base="", tuned="", severity=severity, why=trap.what + more)


def _same_file(base: Path, tuned: Path, name: str) -> bool:
    """Whether both folders hold a file of the same bytes; true if the trap is about no file."""
    return not name or filecmp.cmp(base / name, tuned / name, shallow=False)
