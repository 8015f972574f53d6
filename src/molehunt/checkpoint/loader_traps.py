"""Folders that loaders read differently than they look, and folders that are refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from molehunt.checkpoint.inventory import Entry, read_header
from molehunt.errors import InvalidInput, UsageError, printable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MAX_JSON = 64 * 2**20
"""Greatest number of bytes of one JSON file; tokenizers of large vocabularies take about 20 MB."""
LIMITS = {
    "num_hidden_layers": 2000, "n_layer": 2000, "num_layers": 2000, "hidden_size": 2**18, "n_embd": 2**18,
    "vocab_size": 2**24, "num_attention_heads": 2**14, "n_head": 2**14, "intermediate_size": 2**22,
    "num_local_experts": 2**14, "num_experts": 2**14, "max_position_embeddings": 2**32,
}  # fmt: skip
"""Largest sizes that are accepted. A config beyond them would exhaust memory before a weight is read."""


@dataclass(frozen=True, slots=True)
class Trap:
    """One way in which a folder may be read differently than it looks."""

    kind: str
    what: str
    severity: Literal["finding", "note"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which files a loader reads, and what each holds."""

    files: tuple[str, ...]
    """Files in reading order: a tensor of a later file overwrites one of the same name in an earlier file."""
    entries: Mapping[str, Mapping[str, Entry]]
    """Entries by file and tensor name."""
    unread: Mapping[str, Mapping[str, Entry]]
    """The same for safetensors files that transformers does not read."""
    traps: tuple[Trap, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InvalidInput, which names the file, for anything else."""
    if path.stat().st_size > MAX_JSON:
        raise InvalidInput(f"{printable(path.name)} is larger than {MAX_JSON >> 20} MB, which no real one is.")
    try:
        value: object = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise InvalidInput(f"{printable(path.name)} is not JSON. Fetch the file again.") from None
    if not isinstance(value, dict):
        raise InvalidInput(f"{printable(path.name)} is not a JSON object. Fetch the file again.")
    return value


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse sizes that no model has. Raises InvalidInput, which names the field."""
    for part in (config, config.get("text_config") or {}):
        for name, limit in LIMITS.items():
            value = part.get(name) if isinstance(part, Mapping) else None
            if value is not None and (type(value) is not int or not 0 <= value <= limit):
                raise InvalidInput(
                    f"config.json says {name} = {printable(repr(value), 40)}; between 0 and {limit} is believed.\n"
                    "Building such a model would exhaust memory before a weight is read."
                )


def inside(folder: Path, name: object) -> Path:
    """The file `name` of `folder`, with links resolved. Raises InvalidInput when it lies elsewhere or does not exist."""
    if not isinstance(name, str):
        raise InvalidInput(f"{INDEX} names a file that is not text: {printable(repr(name), 60)}")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise InvalidInput(
            f"{INDEX} names {printable(repr(name), 80)}, which lies outside the folder. Loaders would follow it.\n"
            "No honest model does that; do not load this one."
        )
    if not path.is_file():
        raise InvalidInput(f"{INDEX} names {printable(name)}, which is not there. Fetch the folder again.")
    return path


def lay_out(folder: Path) -> Layout:
    """The weight files of a model folder that are loaded, from their headers and never from the index alone.

    transformers takes `model.safetensors` if it exists, and otherwise every tensor of every shard that the index names.
    Of two tensors with one name, the last one is loaded.

    Raises:
        InvalidInput: no safetensors weights, a broken file, or an index that leads out of the folder.
    """
    present = sorted(
        p.name for p in folder.iterdir() if p.suffix == ".safetensors" and not p.name.startswith("adapter_")
    )
    has_index = (folder / INDEX).is_file()
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES and p.name != "training_args.bin")
    if not present and not has_index:
        if pickles:
            raise InvalidInput(
                f"the weights are pickles ({printable(', '.join(pickles), 80)}), which can run code when opened; they "
                "are never opened here.\nConvert them to safetensors in a sandbox without network or secrets."
            )
        raise InvalidInput(f"{printable(folder.name)} holds no safetensors file, so there are no weights to read.")
    traps: list[Trap] = [
        Trap(
            "pickle beside the weights",
            f"{printable(name)} is ignored here and by loaders that prefer safetensors",
            "note",
        )
        for name in pickles
    ]
    weight_map: dict[str, Any] = {}
    if has_index:
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise InvalidInput(f"{INDEX} has no weight_map. Fetch the file again.")
        weight_map = listed
        for name in sorted({str(v) if isinstance(v, str) else repr(v) for v in weight_map.values()}):
            inside(folder, name)
    for name in present:
        inside(folder, name)  # a shard may be a link out of the folder, too
    if SINGLE in present:
        files = (SINGLE,)
        if has_index:
            traps.append(
                Trap(
                    "single file and index",
                    f"{SINGLE} stands beside {INDEX}; transformers reads the single file",
                    "finding",
                )
            )
    else:
        files = tuple(sorted(set(weight_map.values()))) if has_index else tuple(present)
    headers = {name: read_header(folder / name) for name in dict.fromkeys((*files, *present))}
    entries = {name: headers[name] for name in files}
    unread = {name: header for name, header in headers.items() if name not in entries}
    traps += _traps(entries, unread, weight_map if SINGLE not in present else {})
    return Layout(files=files, entries=entries, unread=unread, traps=tuple(traps))


def _traps(
    entries: Mapping[str, Mapping[str, Entry]], unread: Mapping[str, Mapping[str, Entry]], weight_map: Mapping[str, Any]
) -> list[Trap]:
    traps: list[Trap] = []
    where: dict[str, list[str]] = {}
    for file, header in entries.items():
        for name in header:
            where.setdefault(name, []).append(file)
    for name, files in where.items():
        if len(files) > 1:
            shown = printable(", ".join(files), 100)
            traps.append(
                Trap(
                    "tensor stored twice",
                    f"{printable(name)} is in {shown}; the last one wins in transformers",
                    "finding",
                )
            )
        if weight_map and name not in weight_map:
            traps.append(
                Trap(
                    "tensor not in the index",
                    f"{printable(name)} is in {printable(files[-1])} and loaded all the same",
                    "finding",
                )
            )
        elif weight_map and weight_map[name] != files[-1]:
            traps.append(
                Trap(
                    "index points elsewhere",
                    f"{printable(name)} is read from {printable(files[-1])}; the index says {printable(str(weight_map[name]))}",
                    "finding",
                )
            )
    for name in weight_map:
        if name not in where:
            raise InvalidInput(
                f"the index lists {printable(name)}, which no shard holds: loaders would fill it with random numbers.\n"
                "Fetch the folder again."
            )
    for file, header in unread.items():
        shown = printable(next(iter(header)), 60)
        traps.append(
            Trap(
                "unlisted file",
                f"{printable(file)} ({len(header)} tensors, such as {shown}) is not read by transformers; other loaders "
                "may read it",
                "finding",
            )
        )
    return traps


def folder_traps(folder: Path, config: Mapping[str, Any], names: frozenset[str]) -> list[Trap]:
    """Findings on code that a loader might run, and on a tie flag that contradicts the weights.

    Raises:
        InvalidInput: untied embeddings without an output matrix, which loaders fill with random numbers.
    """
    traps = [
        Trap(
            "code in the folder", f"{printable(path.name)} is never run here; trust_remote_code would run it", "finding"
        )
        for path in sorted(folder.iterdir())
        if path.suffix == ".py"
    ]
    if config.get("auto_map"):
        traps.append(Trap("auto_map", "config.json names code to run in place of the library's own", "finding"))
    untied = config.get("tie_word_embeddings") is False
    if untied and any(n.endswith("embed_tokens.weight") for n in names) and not any("lm_head" in n for n in names):
        raise InvalidInput(
            "config.json says that embeddings are not tied, and the weights hold no lm_head.weight: loaders fill it with "
            "random numbers without an error.\nSet tie_word_embeddings to true or fetch the missing weights."
        )
    if config.get("tie_word_embeddings") and any(n.endswith("lm_head.weight") for n in names):
        traps.append(
            Trap("tied and stored", "lm_head.weight is stored although embeddings are tied: it is ignored", "note")
        )
    return traps


def adapter_beside(folder: Path, adapter: str) -> list[Trap]:
    """The finding on an adapter beside full weights. Raises UsageError when `adapter` does not say whether to apply it."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return []
    if adapter == "refuse":
        raise UsageError(
            f"{printable(folder.name)} holds full weights and an adapter beside them; loaders apply the adapter "
            "by default.\nSay which of the two is meant: --adapter applies it, --no-adapter leaves it out."
        )
    done = "applied" if adapter == "use" else "left out"
    return [Trap("adapter beside the weights", f"from_pretrained applies it by default; here it is {done}", "finding")]
