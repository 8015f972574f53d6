"""Differences between tokenizers: the same text must become the same tokens."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molehunt.checkpoint.difference import FolderDifference, Severity
from molehunt.checkpoint.loader_traps import read_json
from molehunt.checkpoint.settings_diff import settings_of

TOKEN_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def tokenizer_differences(base: Path, tuned: Path, adapter: bool) -> Iterator[FolderDifference]:
    name = "tokenizer.json"
    if not (base / name).is_file() or not (tuned / name).is_file():
        if (base / name).is_file() != (tuned / name).is_file() and not adapter:
            yield FolderDifference(
                file=name, key="", base=str((base / name).is_file()), tuned=str((tuned / name).is_file()),
                severity="note", why="one side has no fast tokenizer",
            )  # fmt: skip
        return
    left, right = read_json(base / name), read_json(tuned / name)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if left.get(part) != right.get(part):
            yield FolderDifference(
                file=name, key=part, base=repr(left.get(part))[:400], tuned=repr(right.get(part))[:400],
                severity="finding", why="the same text becomes other tokens, or tokens become other text",
            )  # fmt: skip
    yield from _added_tokens(name, *(_token_rows(side.get("added_tokens")) for side in (left, right)))
    models: list[Mapping[str, Any]] = [
        side["model"] if isinstance(side.get("model"), Mapping) else {} for side in (left, right)
    ]
    for part in ("vocab", "merges"):
        if models[0].get(part) != models[1].get(part):
            a, b = (models[i].get(part) or () for i in (0, 1))
            yield FolderDifference(
                file=name, key=f"model.{part}", base=f"{len(a)} entries", tuned=f"{len(b)} entries",
                severity="finding", why="the same text becomes other tokens",
            )  # fmt: skip


def slow_tokenizer_differences(base: Path, tuned: Path) -> Iterator[FolderDifference]:
    """Tokens that are listed in the tokenizer's configuration. Not every version writes them, so both sides must have them."""
    name = "tokenizer_config.json"
    listed = [settings_of(folder / name).get("added_tokens_decoder") for folder in (base, tuned)]
    rows = [
        _token_rows([{**t, "id": i} for i, t in side.items() if isinstance(t, Mapping)])
        for side in listed
        if isinstance(side, Mapping)
    ]
    if len(rows) == 2:
        yield from _added_tokens(name, *rows)


def _token_rows(tokens: object) -> dict[str, list[str]]:
    """Content → id and flags of every added token of that content."""
    found: dict[str, list[str]] = {}
    for token in tokens if isinstance(tokens, list) else []:
        if isinstance(token, Mapping):
            flags = [flag for flag in TOKEN_FLAGS if token.get(flag)]
            found.setdefault(str(token.get("content")), []).append(" ".join([f"id {token.get('id')}", *flags]))
    return {content: sorted(rows) for content, rows in found.items()}


def _added_tokens(
    name: str, base: Mapping[str, list[str]], tuned: Mapping[str, list[str]]
) -> Iterator[FolderDifference]:
    ids = [{row.split()[1] for rows in side.values() for row in rows} for side in (base, tuned)]
    for content in sorted(base.keys() | tuned.keys()):
        one, other = base.get(content), tuned.get(content)
        if one == other:
            continue
        severity: Severity = "note"
        why = "a token was added or removed"
        if one is not None and other is not None:
            severity, why = "finding", "a token has another id or other flags: the same text becomes other tokens"
        elif {row.split()[1] for row in one or other or []} & ids[0 if one is None else 1]:
            severity, why = "finding", "a token stands where the other side has another one"
        yield FolderDifference(
            file=name, key="added_tokens", base="(absent)" if one is None else f"{content!r}: {', '.join(one)}",
            tuned="(absent)" if other is None else f"{content!r}: {', '.join(other)}", severity=severity, why=why,
        )  # fmt: skip
