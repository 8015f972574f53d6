"""Compare two folders as loaders would read them; no weight is read and no model is run."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molehunt.checkpoint.difference import FolderDifference
from molehunt.checkpoint.folder_diff import folder_differences
from molehunt.checkpoint.reader import AdapterChoice, Checkpoint, paired_names
from molehunt.errors import InvalidInput, ShapeMismatch, printable
from molehunt.run.progress import Track, busy, silent


@dataclass(frozen=True, kw_only=True)
class FolderComparison:
    """Differences between two folders and ways in which loaders may disagree about either."""

    rows: tuple[FolderDifference, ...]
    base_sha256: str
    tuned_sha256: str
    tensors: int
    """Number of tensors that were compared by shape and dtype."""

    @property
    def findings(self) -> int:
        """Rows that change output without a weight change, or that loaders disagree on."""
        return sum(row.severity == "finding" for row in self.rows)

    @property
    def verdict(self) -> str:
        """FLAGGED-CORRELATIONAL when there is a finding."""
        return "FLAGGED-CORRELATIONAL" if self.findings else "NO FINDING"

    @property
    def exit_code(self) -> int:
        """1 when flagged, else 0."""
        return 1 if self.findings else 0

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        header: dict[str, Any] = {"schema_version": 1, "verdict": self.verdict, "exit_code": self.exit_code}
        return json.dumps({**header, **asdict(self)}, indent=2, ensure_ascii=False)

    def to_table(self) -> str:
        """A table for people, at most 100 columns wide."""
        if not self.rows:
            return f"{self.verdict}: {self.tensors} tensors agree in name, shape and dtype; no other file differs."
        lines = [f"{self.verdict}: {self.findings} findings and {len(self.rows) - self.findings} notes", ""]
        for row in self.rows:
            lines.append(printable(f"{row.severity:<8} {row.file}: {row.key}", 100))
            lines.append(f"         {printable(row.why, 90)}")
            if row.base or row.tuned:
                lines.append(f"         base:  {printable(row.base, 83)}")
                lines.append(f"         tuned: {printable(row.tuned, 83)}")
        return "\n".join(lines)


def compare_folders(
    base: str | Path, tuned: str | Path, *, adapter: AdapterChoice = "refuse", track: Track = silent
) -> FolderComparison:
    """Compare everything but the values of the weights.

    Raises:
        InvalidInput: a folder is broken or refused, or the base is an adapter.
        ShapeMismatch: a tensor differs in shape: this is another model's base.
        UsageError: a folder is missing, or `adapter` must be given.
        NotTestable: an adapter of a kind that is not read.
    """
    left = Checkpoint.open(base)
    right = Checkpoint.open(tuned, adapter=adapter)
    if left.kind != "model":
        raise InvalidInput("The base is an adapter. Give the model that it was trained on.")
    rows = [
        FolderDifference(file=side, key=trap.kind, base="", tuned="", severity=trap.severity, why=trap.what)
        for side, checkpoint in (("base folder", left), ("tuned folder", right))
        for trap in checkpoint.findings
    ]
    tensors = 0
    if right.kind == "model":
        tensors, found = _tensors(left, right, track)
        rows += found
    rows += folder_differences(left.path, right.path)
    rows.sort(key=lambda row: row.severity != "finding")
    with busy(track, "hashing both folders"):
        hashes = left.content_hash(), right.content_hash()
    return FolderComparison(rows=tuple(rows), base_sha256=hashes[0], tuned_sha256=hashes[1], tensors=tensors)


def _tensors(base: Checkpoint, tuned: Checkpoint, track: Track) -> tuple[int, list[FolderDifference]]:
    both, only_base, only_tuned = paired_names(base, tuned)
    rows: list[FolderDifference] = []
    for name in track(both, "comparing shapes", len(both)):
        if base.shape(name) != tuned.shape(name):
            if base.shape(name)[1:] != tuned.shape(name)[1:] or "layers" in name:
                raise ShapeMismatch(name, base.shape(name), tuned.shape(name))
            rows.append(_row(name, base.shape(name), tuned.shape(name), "the vocabulary was resized"))
        if base.dtype(name) != tuned.dtype(name):
            rows.append(_row(name, base.dtype(name), tuned.dtype(name), "stored in another format"))
    rows += [_row(name, "present", "(absent)", "only in the base: tied, or missing") for name in only_base]
    rows += [
        _row(name, "(absent)", "present", "only in the fine-tune: ignored by loaders, or untied") for name in only_tuned
    ]
    for side in ("base", "tuned"):
        quantisation = (base if side == "base" else tuned).quantisation
        if quantisation is not None:
            exact = "can be undone exactly" if quantisation.exact else "cannot be undone exactly: weights NOT TESTABLE"
            rows.append(_row("quantisation", quantisation.method, "", f"{side}: {exact}"))
    return len(both), rows


def _row(name: str, base: object, tuned: object, why: str) -> FolderDifference:
    shown = [str(list(v)) if isinstance(v, tuple) else str(v) for v in (base, tuned)]
    return FolderDifference(file="tensors", key=name, base=shown[0], tuned=shown[1], severity="note", why=why)
