"""Which configs are refused before anything is built from them, and which field of a config an error is about."""

import re
from collections.abc import Generator, Mapping
from typing import Any

from molehunt.errors import InvalidInput, printable

LIMITS = {
    "num_hidden_layers": 2000, "n_layer": 2000, "num_layers": 2000, "n_layers": 2000, "hidden_size": 2**18,
    "n_embd": 2**18, "d_model": 2**18, "vocab_size": 2**24, "num_attention_heads": 2**14, "n_head": 2**14,
    "num_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**16, "intermediate_size": 2**22, "ffn_dim": 2**22,
    "num_local_experts": 2**14, "num_experts": 2**14, "n_routed_experts": 2**14, "n_positions": 2**15,
    "max_position_embeddings": 2**32, "num_labels": 2**20,
}  # fmt: skip
"""Largest sizes that are accepted. A config beyond them would exhaust memory before a weight is read."""
CODE_CHOICES = ("attn_implementation", "experts_implementation")
"""Endings of fields that choose which code computes a layer. transformers fetches code for a value with a slash."""
DEPTH = 4
"""How deep configs are nested in one another: a wrapper holds a thinker, which holds the text model."""


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse sizes that no model has, and code from the hub. Raises InvalidInput, which names the field."""
    for part in _parts(config, DEPTH):
        for name, limit in LIMITS.items():
            value = part.get(name)
            per_layer: list[Any] = value if isinstance(value, list) and len(value) <= LIMITS["num_layers"] else [value]
            if value is not None and not all(type(one) is int and 0 <= one <= limit for one in per_layer):
                raise InvalidInput(
                    f"config.json says {name} = {printable(repr(value), 40)}; between 0 and {limit} is believed.\n"
                    "Building such a model would exhaust memory before a weight is read."
                )
        for name, value in part.items():
            asked = list(value.values()) if isinstance(value, Mapping) else [value]
            if name.endswith(CODE_CHOICES) and any(isinstance(one, str) and "/" in one for one in asked):
                raise InvalidInput(
                    f"config.json says {printable(name, 40)} = {printable(repr(value), 80)}: code that transformers would "
                    "fetch from the hub and run. It is never run here.\nTake the field out to use the built-in code."
                )


def _parts(config: Mapping[str, Any], depth: int) -> Generator[Mapping[str, Any], None, None]:
    """A config and those that are nested in it."""
    yield config
    for name, value in config.items():
        if depth and isinstance(value, Mapping) and (name.endswith("_config") or name == "decoder"):
            yield from _parts(value, depth - 1)


def suspected_field(config: Mapping[str, Any], error: str) -> str:
    """The field that an error of a library is about, as ` (config.json says head_dim = 0)`; empty if none stands out.

    That is one whose name or value the error names, or else a size that is not positive.
    """
    fields = [(name, value) for part in _parts(config, DEPTH) for name, value in part.items()]
    words = frozenset(re.findall(r"\w+", error))
    ranked = (
        [one for one in fields if one[0] in words],
        [one for one in fields if any(len(text) > 3 and text in error for text in _texts(one[1]))],
        [one for one in fields if one[0] in LIMITS and one[1] is not None and not _is_size(one[1])],
    )
    found = next((one for group in ranked for one in group), None)
    if found is None:
        return ""
    return f" (config.json says {printable(found[0], 40)} = {printable(repr(found[1]), 60)})"


def _texts(value: Any) -> list[str]:
    """The texts in a field's value, which may be a small map."""
    inner = list(value.values()) if isinstance(value, Mapping) else [value]
    return [text for text in inner if isinstance(text, str)]


def _is_size(value: Any) -> bool:
    return (type(value) is int and value > 0) or isinstance(value, list)
