"""What `gguf.json` says of a folder that was converted from a GGUF file."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from molehunt.run.cache_folders import cache_folder

FACTS = "gguf.json"
"""File of a converted folder that says what it was made of."""


def conversions() -> Path:
    """The folder that converted GGUF files lie in, each under the hash of its file."""
    return cache_folder() / "gguf"


def conversion_facts(folder: Path) -> Mapping[str, Any]:
    """The content of `gguf.json` of a folder in `conversions()`; empty for any other folder.

    In a stranger's folder the file is not believed: it could pass off a change as rounding.
    """
    return _facts(folder.absolute())


def converted_roundings(folder: Path) -> Mapping[str, float]:
    """Tensor → spectral norm of the rounding that its GGUF format made; empty for a folder that was not converted."""
    return conversion_facts(folder).get("rounding_norms", {})


def formats(facts: Mapping[str, Any]) -> str:
    """The formats of a converted folder's tensors, the most frequent one first: `Q4_K, Q6_K, F32`."""
    types = list(facts["types"].values())
    return ", ".join(sorted(set(types), key=lambda kind: (-types.count(kind), kind)))


@lru_cache(maxsize=16)
def _facts(folder: Path) -> Mapping[str, Any]:
    if folder.parent.parent != conversions() or not (folder / FACTS).is_file():
        return {}
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))
