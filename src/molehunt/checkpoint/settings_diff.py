"""Differences between configuration and generation settings, by what they do."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molehunt.checkpoint.config_meaning import meant_configs
from molehunt.checkpoint.difference import FolderDifference
from molehunt.checkpoint.loader_traps import read_json
from molehunt.checkpoint.setting_context import rule_by_context, under_one_name
from molehunt.checkpoint.setting_rules import (
    CODE,
    DEFAULTS,
    PROCESSOR,
    SAMPLING,
    STEERING,
    TEXT_PARTS,
    TOKEN_IDS,
    Rule,
    config_rule,
    generation_rule,
    processor_rule,
    tokenizer_rule,
)

SETTINGS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", *sorted(PROCESSOR)
)  # fmt: skip
_Flat = dict[tuple[str, ...], Any]


def settings_of(path: Path) -> dict[str, Any]:
    """A settings file without its chat template, which is compared by what it renders; empty where there is none."""
    if not path.is_file():
        return {}
    settings = read_json(path)
    settings.pop("chat_template", None)
    return settings


def flat(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> _Flat:
    """Nested settings as one mapping from paths to values. Lists are not split."""
    found: _Flat = {}
    for key, one in value.items():
        if isinstance(one, Mapping) and one:
            found.update(flat(one, (*path, key)))
        else:
            found[*path, key] = one
    return found


def setting_differences(
    name: str, base: Path, tuned: Path, texts: str = "", *, inherits: bool = False
) -> Iterator[FolderDifference]:
    """What differs in one settings file, each key by what is known of it.

    Args:
        name: the file.
        base: folder of the base.
        tuned: folder of the fine-tune, which may lack the file.
        texts: what comparing the tokenizers found, for keys of theirs that are not known.
        inherits: whether generation settings that the fine-tune lacks are those of the base, as for an adapter.

    Raises:
        InvalidInput: a file is no JSON object.
    """
    left, right = settings_of(base / name), settings_of(tuned / name)
    one, other, known = flat(left), flat(right), frozenset[str]()
    if name == "config.json":
        one, other = under_one_name(one), under_one_name(other)
    changed = _changed(one, other)
    if name == "generation_config.json":
        if inherits:
            other = one | other
        one, other = _generation(one, base), _generation(other, base if inherits else tuned)
        changed = _changed(one, other)
    elif name == "config.json" and any(
        _rule(name, path, (one, other), True, texts)[0] != "harmless" for path in changed
    ):
        meant = meant_configs(base, tuned) if left and right else None
        if meant is not None:
            known = meant[2]
            dangerous = {path for path in changed if _is_loading(path)}
            written = {path: value for path, value in other.items() if path in changed}
            one = under_one_name(flat(meant[0])) | _only(one, dangerous)
            other = under_one_name(flat(meant[1])) | _only(other, dangerous)
            changed = _changed(one, other)
            yield from _contradicted(written, other)
    for path in changed:
        severity, why = _rule(name, path, (one, other), any(part in known for part in path), texts)
        if severity != "harmless":
            yield FolderDifference(
                file=name,
                key=".".join(path),
                base=_shown(one, path),
                tuned=_shown(other, path),
                severity=severity,
                why=why,
            )
    yield from _on_both_sides(name, one, other)


def _contradicted(written: _Flat, meant: _Flat) -> Iterator[FolderDifference]:
    """Keys whose value transformers does not take although it has such a key: it read another one in their place."""
    for path, value in written.items():
        taken = [one for key, one in meant.items() if key[-1] == path[-1]]
        if (rule_by_context(path, meant, meant) or ("finding", ""))[
            0
        ] != "finding":  # such as a window no layer looks through
            continue
        matters = value is not None and config_rule(path, "", True)[0] != "harmless"
        if matters and taken and not any(_same(value, one) for one in taken):
            yield FolderDifference(
                file="config.json",
                key=".".join(path),
                base=repr(taken[0])[:400],
                tuned=repr(value)[:400],
                severity="finding",
                why="transformers takes another value in its place (shown as the base's); other loaders may take this one",
            )


def _rule(name: str, path: tuple[str, ...], sides: tuple[_Flat, _Flat], known: bool, texts: str) -> Rule:
    if name == "config.json":
        return rule_by_context(path, *sides) or config_rule(path, _shown(sides[1], path), known)
    if name == "generation_config.json":
        return generation_rule(path)
    return processor_rule(path) if name in PROCESSOR else tokenizer_rule(path, texts)


def _is_loading(path: tuple[str, ...]) -> bool:
    """Whether a key chooses code or files, which transformers may take out of the settings that it holds."""
    return any(part in CODE or part.endswith("attn_implementation") for part in path)


def _only(settings: _Flat, paths: set[tuple[str, ...]]) -> _Flat:
    return {path: value for path, value in settings.items() if path in paths}


def _changed(one: _Flat, other: _Flat) -> list[tuple[str, ...]]:
    return sorted(path for path in one.keys() | other.keys() if not _same(one.get(path), other.get(path)))


def _same(one: object, other: object) -> bool:
    """Whether two JSON values are one: 1 and 1.0 are, 1 and true are not, and a missing value is null."""
    if isinstance(one, int | float) and isinstance(other, int | float) and not isinstance(one, bool | str):
        return not isinstance(other, bool) and (one == other or (one != one and other != other))
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _generation(settings: _Flat, folder: Path) -> _Flat:
    """Generation settings without those that only say what holds anyway, and with those that the model's config gives.

    transformers takes them from config.json where there is no generation_config.json, from its outermost level first and
    then from the part for text. Other loaders take some of them at any rate.
    """
    config = settings_of(folder / "config.json")
    inner: dict[str, Any] = next(
        (config[part] for part in sorted(TEXT_PARTS) if isinstance(config.get(part), dict)), {}
    )
    found = dict(settings)
    for key in (*TOKEN_IDS, *STEERING, *SAMPLING):
        given = next((one for one in (config.get(key), inner.get(key)) if one is not None), None)
        said = any(path[0] == key and value is not None for path, value in settings.items())
        if given is not None and not said:
            found.update(flat({key: given}))
    return {path: value for path, value in found.items() if not _says_nothing(path[0], value)}


def _says_nothing(key: str, value: object) -> bool:
    """Whether a generation setting only says what holds anyway."""
    return key in DEFAULTS and _same(value, DEFAULTS[key])


def _on_both_sides(name: str, one: _Flat, other: _Flat) -> Iterator[FolderDifference]:
    """Notes on settings that force tokens or name code, which both sides have alike."""
    for path in sorted(one.keys() & other.keys()):
        listed = CODE if name != "generation_config.json" else CODE | STEERING
        if path[0] in listed and one[path] not in (None, False, [], {}) and _same(one[path], other[path]):
            yield FolderDifference(
                file=name, key=".".join(path), base=_shown(one, path), tuned=_shown(other, path), severity="note",
                why=f"on both sides alike: {listed[path[0]]}",
            )  # fmt: skip


def _shown(settings: _Flat, path: tuple[str, ...]) -> str:
    return repr(settings[path])[:400] if path in settings else "(absent)"
