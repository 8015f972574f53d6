"""Compare two folders as loaders would read them; no weight is read and no model is run."""

import filecmp
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import Any

from molehunt.audit.adapter_files import adapter_differences, nonfinite_rows
from molehunt.audit.base_identity import BaseIdentity, base_identity
from molehunt.audit.base_ranking import RankedBase, nearer_base, rank_bases, ranking_table
from molehunt.audit.stored_tensors import tensor_differences
from molehunt.checkpoint.adapter_folder import adapter_notes
from molehunt.checkpoint.difference import FolderDifference, Severity
from molehunt.checkpoint.folder_diff import folder_differences
from molehunt.checkpoint.gguf_facts import conversion_facts, formats
from molehunt.checkpoint.hub import local_folder
from molehunt.checkpoint.loader_traps import Trap
from molehunt.checkpoint.reader import AdapterChoice, Checkpoint
from molehunt.errors import InvalidInput, printable
from molehunt.run.counting import counted
from molehunt.run.progress import Track, busy, silent

MOST = 1200
"""Number of characters of a reason that are shown."""


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
        """FLAGGED-CORRELATIONAL when there is a finding.

        NOT TESTABLE against a base that is another model's, and without a finding where there are weights of which nobody
        can say whether they changed.
        """
        if self._wrong_base:
            return "NOT TESTABLE"
        if self.findings:
            return "FLAGGED-CORRELATIONAL"
        return "NOT TESTABLE" if self._unread else "NO FINDING"

    @property
    def exit_code(self) -> int:
        """3 when not testable, 1 when flagged, else 0."""
        return {"NOT TESTABLE": 3, "NO FINDING": 0}.get(self.verdict, 1)

    @property
    def _unread(self) -> int:
        return 0 if self.identity is None else self.identity.unread

    @property
    def _wrong_base(self) -> bool:
        return self.identity is not None and self.identity.relation == "unrelated"

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        header: dict[str, Any] = {"schema_version": 1, "verdict": self.verdict, "exit_code": self.exit_code}
        return json.dumps({**header, **asdict(self)}, indent=2, ensure_ascii=False)

    def to_table(self) -> str:
        """A table for people, at most 100 columns wide."""
        lines = [*wrap(self._headline(), 100), ""]
        if self.identity is not None:
            lines += [*(line for said in self.identity.lines() for line in wrap(said, 100)), ""]
        if self.bases:
            lines += [*ranking_table(self.bases), ""]
        for row in self.rows:
            lines.append(printable(f"{row.severity:<8} {row.file}: {row.key}", 100))
            lines += wrap(printable(row.why, MOST), 100, initial_indent=" " * 9, subsequent_indent=" " * 9)
            for side, value in (("base:", row.base), ("tuned:", row.tuned)):
                lines += [f"         {side:<7}{printable(value, 83)}"] if value else []
        return "\n".join(lines).rstrip()

    def _headline(self) -> str:
        """The verdict and what it counts."""
        notes = len(self.rows) - self.findings
        total = f"{counted(self.findings, 'finding')} and {counted(notes, 'note')}"
        if self._wrong_base:
            return (
                f"{self.verdict}: BASE is not the model that TUNED was made from, so nothing here says what TUNED changed "
                f"({total}).{self._nearer()}"
            )
        if not self.rows:
            same = f"{counted(self.tensors, 'tensor')} {'agrees' if self.tensors == 1 else 'agree'} in name, shape and dtype"
            return f"{self.verdict}: {same}; no other file differs.{self._nearer()}"
        if self._unread and not self.findings:
            return (
                f"{self.verdict}: {counted(self._unread, 'tensor')} cannot be compared, of a quantisation that cannot be "
                f"undone exactly; the rest is {total}. Compare the unquantised releases.{self._nearer()}"
            )
        return f"{self.verdict}: {total}.{self._nearer()}"

    def _nearer(self) -> str:
        """Which candidate is nearer to the fine-tune than the base, if one clearly is."""
        name = nearer_base(self.bases)
        return f" {name} is nearer: use it as BASE." if name else ""


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
    wrong = identity.relation == "unrelated"
    if right.kind == "model":
        tensors = identity.tensors
        rows += _nonfinite_rows(identity)
        if not wrong:
            tensors, found = tensor_differences(left, right, track)
            rows += found
    elif wrong:
        rows += adapter_notes(left.path, right.adapter)
    else:
        seen = adapter_differences(left, right)
        rows += seen.rows
        identity = replace(identity, kind=seen.kind)
    rows += folder_differences(left.path, right.path, tokenizers=not wrong)
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


def _nonfinite_rows(identity: BaseIdentity) -> list[FolderDifference]:
    """Findings on NaN and infinity in either side's weights; a note where the fine-tune has them from its base."""
    rows = nonfinite_rows("TUNED", "tensors", identity.nonfinite)
    rows += nonfinite_rows("BASE", "tensors", identity.nonfinite_in_base)
    return rows


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
