"""Differences between the stored tensors of two folders by name, shape and data type; no difference of values is taken."""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from molehunt.checkpoint.difference import FolderDifference, Severity
from molehunt.checkpoint.loaded_view import LoadedView
from molehunt.checkpoint.reader import Checkpoint, paired_names
from molehunt.errors import InvalidInput, NotTestable, ShapeMismatch, printable
from molehunt.run.progress import Track

Shapes = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name of a tensor, its shape in the base and that in the fine-tune."""
SHOWN = 20
"""Number of tensors of one kind that get a row of their own."""


def tensor_differences(base: Checkpoint, tuned: Checkpoint, track: Track) -> tuple[int, list[FolderDifference]]:
    """Number of compared tensors, and their differences.

    Tensors are paired as transformers loads them, so another prefix or fused experts are one note. For an architecture
    that it cannot load as a language model they are paired by their stored names, and a note says so.

    Raises:
        InvalidInput: loaders would fill parameters of a folder with random numbers.
        ShapeMismatch: a tensor differs in shape: this is another model's base.
    """
    rows: list[FolderDifference] = []
    ours, theirs = _complete_view(base), _complete_view(tuned)
    if isinstance(ours, LoadedView) and isinstance(theirs, LoadedView):
        tensors, found = _as_loaded(ours, theirs, track)
    else:
        for side in (base, tuned):
            side.layout.refuse_unheld()
        if isinstance(ours, LoadedView):  # the base writes text, and the fine-tune does not
            rows.append(_side_row("tuned", "architecture", str(theirs), "finding"))
        else:
            rows.append(_row("architecture", "", "", f"compared by stored names alone: {ours}"))
        tensors, found = _by_stored_names(base, tuned, track)
    rows += found
    for side, quantisation in (("base", base.quantisation), ("tuned", tuned.quantisation)):
        if quantisation is not None:
            exact = "can be undone exactly" if quantisation.exact else "cannot be undone exactly: weights NOT TESTABLE"
            rows.append(_row("quantisation", quantisation.method, "", f"{side}: {exact}"))
    return tensors, rows


def _complete_view(side: Checkpoint) -> LoadedView | str:
    """A folder as transformers loads it, or why it cannot load it as a language model."""
    try:
        view = LoadedView.of(side)
        view.must_be_complete()
    except NotTestable as error:
        return str(error).splitlines()[0]
    return view


def _as_loaded(base: LoadedView, tuned: LoadedView, track: Track) -> tuple[int, list[FolderDifference]]:
    rows: list[FolderDifference] = []
    for side, view in (("base", base), ("tuned", tuned)):
        rows += _claims(side, view)
    names = sorted({*base.names(), *tuned.names()})
    packed = base.checkpoint.quantisation is not None or tuned.checkpoint.quantisation is not None
    layouts = 0
    types: list[tuple[torch.dtype, torch.dtype, str]] = []
    shapes: list[Shapes] = []
    for name in track(names, "comparing shapes", len(names)):
        ours, theirs = (view.tied.get(name, name) for view in (base, tuned))
        if ours not in base.names() or theirs not in tuned.names():
            side = "the base" if ours in base.names() else "the fine-tune"
            rows.append(_row(name, str(ours in base.names()), str(theirs in tuned.names()), f"only in {side}"))
            continue
        if (ours == name) != (theirs == name):
            why = f"tied to another parameter on one side only; {_change(base, tuned, ours, theirs)}"
            rows.append(_row(name, _tie(ours, name), _tie(theirs, name), why))
        layouts += ours == theirs and base.sources(ours) != tuned.sources(theirs)
        shapes.append((name, base.shape(ours), tuned.shape(theirs)))
        types.append((base.dtype(ours), tuned.dtype(theirs), name))
    rows += _shapes(shapes, packed=packed)
    if layouts:
        why = f"{layouts} parameters are stored under other names, or joined and split in another way; loaders make the same of them"
        rows.append(_row("layout", "", "", why))
    return len(names), rows + list(_formats(types))


def _claims(side: str, view: LoadedView) -> Iterator[FolderDifference]:
    """Tensors of one side that loaders drop, or of which they choose one."""
    severity: Severity = "finding" if side == "tuned" else "note"
    for name, sources in view.doubled.items():
        shown = printable(", ".join(sources), 160)
        why = f"{shown} all claim it; transformers loads {printable(next(iter(sources)))}, and other loaders may load another"
        yield _side_row(side, name, why, severity)
    for name, source in view.apart:
        if not _equal(view, name, source):
            why = f"config.json ties it to {printable(source)}, and another value is stored: transformers loads that, others tie"
            yield _side_row(side, name, why, severity)
    dropped = view.unexpected
    for name in dropped[:SHOWN]:
        yield _side_row(side, name, "transformers does not load it; other loaders may", "note")
    if len(dropped) > SHOWN:
        yield _side_row(side, "…", f"{len(dropped) - SHOWN} more tensors that transformers does not load", "note")


def _equal(view: LoadedView, name: str, source: str) -> bool:
    """Whether two parameters have the same stored values."""
    if view.shape(name) != view.shape(source):
        return False
    read = view.checkpoint.stored
    one, other = view.tensor(name, read), view.tensor(source, read)
    return one.dtype == other.dtype and torch.equal(one, other)


def _change(base: LoadedView, tuned: LoadedView, ours: str, theirs: str) -> str:
    """Whether a parameter has the same values in both, in words."""
    if base.shape(ours) != tuned.shape(theirs):
        return "its shapes differ"
    try:
        one, other = base.tensor(ours), tuned.tensor(theirs)
    except (NotTestable, InvalidInput):
        return "its values cannot be compared"
    return "with the same values" if torch.equal(one.float(), other.float()) else "its values changed"


def _shapes(shapes: Sequence[Shapes], *, packed: bool) -> Iterator[FolderDifference]:
    """Rows on the tensors that differ in shape."""
    differ = [one for one in shapes if one[1] != one[2]]
    if packed and differ:
        name, base, tuned = differ[0]
        key = name if len(differ) == 1 else f"{len(differ)} tensors, such as {name}"
        yield _row(key, base, tuned, "stored in another format by quantisation: NOT TESTABLE")
        return
    for name, base, tuned in differ:
        if base[1:] != tuned[1:] or "layers" in name:
            raise ShapeMismatch(name, base, tuned)
        yield _row(name, base, tuned, "the vocabulary was resized")


def _by_stored_names(base: Checkpoint, tuned: Checkpoint, track: Track) -> tuple[int, list[FolderDifference]]:
    both, only_base, only_tuned = paired_names(base, tuned)
    rows: list[FolderDifference] = []
    packed = base.quantisation is not None or tuned.quantisation is not None
    shapes = [(name, base.shape(name), tuned.shape(name)) for name in track(both, "comparing shapes", len(both))]
    rows += _shapes(shapes, packed=packed)
    if len(both) < len(only_base):
        why = f"{len(only_base)} of the base's {len(both) + len(only_base)} tensors are missing under their names, such as"
        rows.append(
            _side_row("tuned", "names", f"{why} {printable(only_base[0], 80)}: loaders would not find them", "finding")
        )
    rows += [_row(name, "present", "(absent)", "only in the base: tied, or missing") for name in only_base]
    why = "only in the fine-tune: ignored by loaders, or untied"
    rows += [_row(name, "(absent)", "present", why) for name in only_tuned]
    return len(both), rows + list(_formats([(base.dtype(name), tuned.dtype(name), name) for name in both]))


def _formats(types: list[tuple[torch.dtype, torch.dtype, str]]) -> Iterator[FolderDifference]:
    """One row for each pair of data types in which tensors are stored, with their number."""
    pairs = Counter((left, right) for left, right, _ in types if left != right)
    for (left, right), count in pairs.items():
        first = next(name for one, other, name in types if (one, other) == (left, right))
        key = first if count == 1 else f"{count} tensors, such as {first}"
        yield _row(key, left, right, "stored in another format")


def _tie(source: str, name: str) -> str:
    return "stored" if source == name else f"tied to {source}"


def _side_row(side: str, key: str, why: str, severity: Severity) -> FolderDifference:
    return FolderDifference(file=f"{side} folder", key=key, base="", tuned="", severity=severity, why=why)


def _row(name: str, base: object, tuned: object, why: str) -> FolderDifference:
    shown = [str(list(v)) if isinstance(v, tuple) else str(v) for v in (base, tuned)]
    return FolderDifference(file="tensors", key=name, base=shown[0], tuned=shown[1], severity="note", why=why)
