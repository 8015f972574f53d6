"""Differences between configuration and generation settings, by meaning."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molehunt.checkpoint.difference import FolderDifference, Severity
from molehunt.checkpoint.loader_traps import read_json

BENIGN = frozenset(
    {
        "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_commit_hash", "architectures",
        "name_or_path", "tokenizer_class", "processor_class", "model_max_length", "padding_side", "truncation_side",
        "padding", "truncation", "local_files_only", "added_tokens_decoder", "is_local", "backend", "extra_special_tokens",
    }
)  # fmt: skip
"""Keys in which two folders may differ without any change of text or weights."""
STEERING = frozenset(
    {
        "sequence_bias", "bad_words_ids", "force_words_ids", "forced_bos_token_id", "forced_eos_token_id",
        "forced_decoder_ids", "suppress_tokens", "begin_suppress_tokens", "constraints", "exponential_decay_length_penalty",
        "watermarking_config", "guidance_scale", "assistant_early_exit", "stop_strings", "prefix_allowed_tokens_fn",
    }
)  # fmt: skip
"""Generation settings that can force or forbid output tokens."""
CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate"})
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def settings_of(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    settings = read_json(path)
    settings.pop("chat_template", None)
    return settings


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping from dotted names to values. Lists are not split."""
    found: dict[str, Any] = {}
    for key, one in value.items():
        if isinstance(one, Mapping) and one:
            found.update(flat(one, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = one
    return found


def setting_differences(name: str, base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Iterator[FolderDifference]:
    left, right = flat(base), flat(tuned)
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) == right.get(key):
            continue
        top, leaf = key.split(".")[0], key.split(".")[-1]
        if top in BENIGN or leaf in BENIGN:
            continue
        severity, why = _rate(name, top, leaf)
        yield FolderDifference(
            file=name, key=key, base=_shown(left, key), tuned=_shown(right, key), severity=severity, why=why
        )


def _rate(name: str, top: str, leaf: str) -> tuple[Severity, str]:
    if top in CODE_KEYS:
        return "finding", "names code that a loader may run"
    if top in STEERING:
        return "finding", "puts tokens into the output or takes them away, whatever the weights say"
    if name == "special_tokens_map.json" or leaf in ("bos_token", "eos_token", "unk_token", "pad_token"):
        return "note", "changes special tokens"
    if name == "generation_config.json":
        return "note", "changes how tokens are sampled"
    return "note", "changes how the model is built or fed"


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return repr(settings[key])[:400] if key in settings else "(absent)"
