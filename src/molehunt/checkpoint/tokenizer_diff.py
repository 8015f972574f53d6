"""Differences between tokenizers: the same text must become the same tokens, and the same tokens the same text."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from molehunt.checkpoint.difference import FolderDifference, Severity
from molehunt.checkpoint.tokenizer_comparison import TokenizerComparison, tokenizer_comparison
from molehunt.checkpoint.tokenizer_state import VOCABULARIES, has_tokenizer
from molehunt.errors import InvalidInput, NotTestable, printable

MOST_TOKENS = 40
"""Number of added tokens of one kind that are listed one by one."""
UNREAD = ("truncation", "padding")
"""Parts of tokenizer.json that transformers sets anew for each call."""
LIMITS = {
    "class": "another class builds the tokenizer",
    "model_max_length": "where text is cut when a program asks for that",
    "padding_side": "which side of a batch is filled up",
    "truncation_side": "which end of a long text is cut off when a program asks for that",
    "clean_up_tokenization_spaces": "whether spaces before punctuation are taken out of answers",
}
"""Settings of a loaded tokenizer besides its special tokens, and what they change."""


def tokenizer_differences(base: Path, tuned: Path, adapter: bool) -> Iterator[FolderDifference]:
    """What differs between the tokenizers of two folders, as transformers loads them.

    Raises:
        InvalidInput: a tokenizer is broken or hostile; the message names the file.
    """
    left, right = has_tokenizer(base), has_tokenizer(tuned)
    if not (left and right):
        if left != right and not adapter:
            why = "only one side has a tokenizer; the base's is used for both" if left else "only the fine-tune has one"
            yield _row("tokenizer", "", str(left), str(right), "note", why)
        return
    yield from _beside(base, tuned)
    try:
        found = tokenizer_comparison(base, tuned)
    except NotTestable as error:
        yield _row("tokenizer", "", "", "", "finding", f"NOT TESTABLE: {' '.join(str(error).split())}")
        return
    if found.texts:
        yield from _of_added_tokens(found)
        yield from _of_text(found)
        yield from _of_parts(found)


def tokenizers_said(rows: Sequence[FolderDifference]) -> str:
    """In one clause, what the comparison of two tokenizers found, for keys that nothing is known of."""
    differ = any(row.severity == "finding" for row in rows)
    return (
        "see the tokenizer's own rows for what differs"
        if differ
        else "the tokenizers make the same ids and the same text"
    )


def _of_text(found: TokenizerComparison) -> Iterator[FolderDifference]:
    name = "tokenizer"
    if found.unsteady[1]:
        both = found.unsteady[0]
        why = "one text becomes other tokens each time that it is encoded" + (", on both sides" if both else "")
        yield _row(name, "encoding", str(both), "True", "note" if both else "finding", why)
    elif found.n_encoded:
        for text, one, other in found.encoded:
            why = f"the same text becomes other tokens ({found.n_encoded} of {found.texts} texts)"
            yield _row(name, f"encoding of {_cut(text)!r}", one, other, "finding", why)
    for ids, one, other in found.decoded:
        why = f"the same tokens become other text ({found.n_decoded} of {found.texts} texts)"
        yield _row(name, f"decoding of {ids[:60]}", one[:400], other[:400], "finding", why)
    if found.direct and found.alike:
        why = (
            f"transformers makes the same ids of {found.texts} texts; loaders that read tokenizer.json themselves make "
            f"other ids of {found.direct}"
        )
        yield _row("tokenizer.json", "", "", "", "note", why)


def _of_parts(found: TokenizerComparison) -> Iterator[FolderDifference]:
    alike = f"other source, same ids and same text on {found.texts} texts"
    for part, one, other, rewrites in found.parts:
        severity: Severity = "note" if found.alike else "finding"
        why = alike if found.alike else "the same text becomes other tokens, or tokens become other text"
        if part in UNREAD:
            severity, why = (
                "note",
                "cuts or fills up text in loaders that read tokenizer.json themselves; not in transformers",
            )
        elif part == "model.dropout" and other not in ("None", "0.0"):
            severity, why = "finding", "one text becomes other tokens each time that it is encoded"
        elif rewrites:
            severity, why = (
                "finding",
                "a rule cuts or replaces text by a pattern that one side lacks; no list of texts holds all that it meets",
            )
        yield _row("tokenizer.json", part, one, other, severity, why)
    for key, one, other in found.settings:
        why = LIMITS.get(key, "changes special tokens")
        yield _row("tokenizer", key, one[:400] or "(absent)", other[:400] or "(absent)", "note", why)


def _of_added_tokens(found: TokenizerComparison) -> Iterator[FolderDifference]:
    shown: dict[str, int] = {}
    for change in found.changes:
        severity: Severity = "note" if change.is_harmless else "finding"
        shown[change.why] = shown.get(change.why, 0) + 1
        if shown[change.why] <= MOST_TOKENS:
            one, other = (f"{change.content!r}: id {ids}" if ids else "(absent)" for ids in (change.base, change.tuned))
            yield _row("tokenizer", "added_tokens", one, other, severity, change.why)
        elif shown[change.why] == MOST_TOKENS + 1:
            more = sum(one.why == change.why for one in found.changes) - MOST_TOKENS
            yield _row("tokenizer", "added_tokens", "", "", severity, f"{more} tokens more: {change.why}")


def _beside(base: Path, tuned: Path) -> Iterator[FolderDifference]:
    """Vocabulary files that lie beside a tokenizer.json, which other loaders read in its place."""
    if not all((folder / "tokenizer.json").is_file() for folder in (base, tuned)):
        return
    for name in (*VOCABULARIES[1:], "merges.txt", "added_tokens.json"):
        here = [(folder / name).is_file() for folder in (base, tuned)]
        if here == [True, True] and not _same_file(base / name, tuned / name):
            why = "transformers reads tokenizer.json; loaders that read this file make other tokens of the same text"
            yield _row(name, "", "", "", "note" if name == "added_tokens.json" else "finding", why)
        elif here[0] != here[1]:
            one, other = ("present" if there else "(absent)" for there in here)
            why = "transformers reads tokenizer.json; other loaders may read this file"
            yield _row(name, "", one, other, "note", why)


def _same_file(one: Path, other: Path) -> bool:
    """Whether two vocabulary files mean the same. Raises InvalidInput for a JSON file that is none."""
    left, right = one.read_bytes(), other.read_bytes()
    if left == right:
        return True
    if one.suffix == ".json":
        return _parsed(one, left) == _parsed(other, right)
    if one.suffix == ".txt":
        return _lines(left) == _lines(right)
    return False


def _parsed(path: Path, raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise InvalidInput(f"{printable(path.parent.name)}/{path.name} is not JSON. Fetch the file again.") from None


def _lines(raw: bytes) -> list[bytes]:
    return [line for line in raw.splitlines() if line and not line.startswith(b"#version")]


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"


def _row(file: str, key: str, base: str, tuned: str, severity: Severity, why: str) -> FolderDifference:
    return FolderDifference(file=file, key=key, base=base, tuned=tuned, severity=severity, why=why)
