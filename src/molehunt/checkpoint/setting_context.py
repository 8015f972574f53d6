"""Settings of config.json that count only together with others: windows, lengths of a context, and data types."""

from collections.abc import Mapping
from typing import Any

from molehunt.checkpoint.setting_rules import TEXT_PARTS, WINDOW_CHOICES, WINDOW_SIZES, Rule

FlatSettings = Mapping[tuple[str, ...], Any]
"""Nested settings as one mapping from paths to values."""
LENGTHS = frozenset({"max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length", "seq_length"})
FIXED_ROPES = frozenset({"None", "default", "linear", "llama3", "proportional"})
"""Kinds of rope that are the same whatever length of a context the config names."""
FLOATS = frozenset({"None", "float64", "float32", "bfloat16", "float16"})
"""Types in which a model may compute without losing more than rounding does."""
ROPES = ("rope_parameters", "rope_scaling")


def under_one_name(settings: FlatSettings) -> dict[tuple[str, ...], Any]:
    """Settings with the old names of the data type and of the kind of rope replaced by the new ones."""
    found: dict[tuple[str, ...], Any] = {}
    for path, value in settings.items():
        new = path
        if path[-1] == "torch_dtype":
            new = (*path[:-1], "dtype")
        elif path[-1] == "type" and any(part in ROPES for part in path):
            new = (*path[:-1], "rope_type")
        if new != path and settings.get(new) is not None:
            continue
        if new[-1] == "dtype" and isinstance(value, str):
            value = value.removeprefix("torch.")
        found[new] = value
    return found


def rule_by_context(path: tuple[str, ...], one: FlatSettings, other: FlatSettings) -> Rule | None:
    """How to rate a difference of config.json whose meaning depends on other settings; None for all others.

    Args:
        path: the keys that lead to the value, outermost first.
        one: all settings of the base.
        other: all settings of the fine-tune.
    """
    key, level = path[-1], path[:-1]
    if not TEXT_PARTS.issuperset(level):
        return None
    if key == "dtype":
        return _dtype_rule(path, one, other)
    if key in LENGTHS and not FIXED_ROPES.issuperset(_ropes(level, one) | _ropes(level, other)):
        why = "this kind of rope depends on the length of the context: the same weights compute something else; "
        return "finding", why + "long-context fine-tunes do this"
    layers = [settings.get((*level, "layer_types")) for settings in (one, other)]
    if key in WINDOW_CHOICES and all(layers):
        return "note", "counts by the layer_types that follow from it, which have a row of their own if they differ"
    if key in WINDOW_SIZES and all(layers) and not any("sliding" in str(kinds) for kinds in layers):
        return "note", "no layer of either side looks through a window"
    return None


def _dtype_rule(path: tuple[str, ...], one: FlatSettings, other: FlatSettings) -> Rule:
    types = [settings.get(path) for settings in (one, other)]
    if len(path) > 1 and None in types:  # versions of transformers write it at every part or at the outermost only
        return "harmless", ""
    if FLOATS.issuperset(map(str, types)):
        return "note", "loaders compute in this type: the same weights, rounded otherwise"
    return "finding", "loaders round the weights to this type: the same weights compute something else"


def _ropes(level: tuple[str, ...], settings: FlatSettings) -> set[str]:
    """The kinds of rope that the settings at one level name."""
    depth = len(level)
    return {
        str(value)
        for path, value in settings.items()
        if path[:depth] == level and path[-1] == "rope_type" and len(path) > depth and path[depth] in ROPES
    }
