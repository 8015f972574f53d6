"""Folders that loaders read differently than they look, and folders that are refused."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from molehunt.checkpoint.links import leads_out, model_name
from molehunt.errors import InvalidInput, UsageError, printable

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_JSON = 64 * 2**20
MAX_TEXT = 256 * 2**20
"""Greatest size in bytes of a file beside the weights. The largest tokenizers of today have 40 MB."""
NO_TEXT = re.compile(r"Classif|Reward|Regress|Rerank|QuestionAnswering|MultipleChoice|TextEncoding|Embedding|ForScor")
"""Of the name of an architecture: that its output is no text."""
HEAD = re.compile(
    r"(.*\.)?(score|classifier|classification_head|reward_head|value_head|v_head|regression_head|qa_outputs)\."
)
"""Names of the tensors of such an output."""
TEXT = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")
"""Greatest number of bytes of one JSON file; tokenizers of large vocabularies take about 20 MB."""


@dataclass(frozen=True, slots=True)
class Trap:
    """One way in which a folder may be read differently than it looks."""

    kind: str
    what: str
    severity: Literal["finding", "note"]
    file: str = ""
    """The file that it is about, relative to the folder: if both folders hold the same one, nobody is accused."""


def refuse_large(folder: Path) -> None:
    """Raises InvalidInput for a settings, tokenizer or template file that is far larger than any real one."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in TEXT and path.is_file() and path.stat().st_size > MAX_TEXT:
            name = printable(path.relative_to(folder).as_posix())
            raise InvalidInput(f"{name} is larger than {MAX_TEXT >> 20} MB, which no real one is. Fetch it again.")


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


def inside(folder: Path, name: object) -> Path:
    """The file `name` of `folder`, with links resolved. Links of the hub's cache to its blobs are followed.

    Raises InvalidInput when it lies elsewhere or does not exist.
    """
    if not isinstance(name, str):
        raise InvalidInput(f"an index or config.json names a file that is not text: {printable(repr(name), 60)}")
    try:
        given, path = Path(name), (folder / name).resolve()
        outside = given.is_absolute() or ".." in given.parts or leads_out(folder, folder / name)
        there = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, with NUL, or a link to itself
        path, outside, there = folder, False, False
    if outside:
        raise InvalidInput(
            f"an index, config.json or a link names {printable(repr(name), 80)}, which lies outside the folder. Loaders "
            "would follow it.\nIf the link is yours, copy the folder with its links followed (cp -rL). No honest model "
            "comes with one; do not load it."
        )
    if not there:
        raise InvalidInput(
            f"an index or config.json names {printable(name)}, which is not there. Fetch the folder again."
        )
    return path


def folder_traps(folder: Path, config: Mapping[str, Any], names: frozenset[str]) -> list[Trap]:
    """Findings on code that a loader might run, notes on names that are no text, and a tie flag that contradicts the weights.

    Raises:
        InvalidInput: untied embeddings of a model of text without an output matrix, which loaders fill with random numbers.
    """
    traps = [
        Trap(
            "code in the folder",
            f"{printable(path.relative_to(folder).as_posix())} is never run here; trust_remote_code would run it",
            "finding",
            path.relative_to(folder).as_posix(),
        )
        for path in sorted(folder.rglob("*.py"))  # also such as custom_generate/generate.py
    ]
    if config.get("auto_map"):
        traps.append(Trap("auto_map", "config.json names code to run in place of the library's own", "finding"))
    traps += _strange_names(folder)
    untied = config.get("tie_word_embeddings") is False
    if untied and any(n.endswith("embed_tokens.weight") for n in names) and not any("lm_head" in n for n in names):
        if textless(config, names):
            return traps
        raise InvalidInput(
            "config.json says that embeddings are not tied, and the weights hold no lm_head.weight: loaders fill it with "
            "random numbers without an error.\nSet tie_word_embeddings to true or fetch the missing weights."
        )
    return traps


def _strange_names(folder: Path) -> list[Trap]:
    """Notes on files whose names are no UTF-8: other machines cannot even write them."""
    found = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
    what = "its name is no UTF-8, so it is shown with escapes; loaders pass over it"
    return [Trap("name of a file", f"{printable(name)}: {what}", "note") for name in found if not _is_text(name)]


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def textless(config: Mapping[str, Any], names: Iterable[str]) -> str:
    """What says that a model gives scores or vectors and no text: its architecture, or a head; empty where nothing does.

    Args:
        config: config.json.
        names: of the stored tensors.
    """
    listed = config.get("architectures")
    stated = [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []
    for one in stated:
        if NO_TEXT.search(one) or (one.endswith("Model") and "Head" not in one):
            return one
    return next((name for name in sorted(names) if HEAD.match(name)), "")


def adapter_beside(folder: Path, adapter: str) -> list[Trap]:
    """The finding on an adapter beside full weights. Raises UsageError when `adapter` does not say whether to apply it."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return []
    if adapter == "refuse":
        raise UsageError(
            f"{printable(model_name(folder))} holds full weights and an adapter beside them; loaders apply the adapter "
            "by default.\nSay which of the two is meant: --adapter applies it, --no-adapter leaves it out."
        )
    done = "applied" if adapter == "use" else "left out"
    return [Trap("adapter beside the weights", f"from_pretrained applies it by default; here it is {done}", "finding")]
