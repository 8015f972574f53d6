"""Where a map comes from, and the file that it is saved in: safetensors, with a JSON header."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor

from molehunt.contracts import TransferMap
from molehunt.run.saved_file import TEXT, header_and_tensors, of_types, reading
from molehunt.run.whole import replace_whole
from molehunt.site import Site

SCHEMA = 1
HEADER = "molehunt_map"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelHashes:
    """The two models of a map: hashes of their checkpoints and tokenizers, None where they were not known."""

    source: str | None = None
    target: str | None = None
    source_tokenizer: str | None = None
    target_tokenizer: str | None = None

    def reversed(self) -> "ModelHashes":
        return ModelHashes(
            source=self.target,
            target=self.source,
            source_tokenizer=self.target_tokenizer,
            target_tokenizer=self.source_tokenizer,
        )


@dataclass(frozen=True, kw_only=True)
class MapFacts:
    """Where a map comes from."""

    method: str = "given"
    """`ridge, λ = 0.001`, `procrustes`, `autoencoder`, …"""
    tokens: int = 0
    """Number of aligned tokens that it was fitted to."""
    models: ModelHashes = field(default_factory=ModelHashes)


@dataclass(frozen=True, eq=False, kw_only=True)
class SavedMap:
    """The contents of a map's file."""

    kind: str
    source: Site
    target: Site
    facts: MapFacts
    more: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def write_map(
    path: Path, kind: str, map: TransferMap, facts: MapFacts, tensors: Mapping[str, Tensor], **more: object
) -> Path:
    """One file, whole or not at all; `more` must be JSON. Returns `path`."""
    fields = {"schema": SCHEMA, "kind": kind, "source": str(map.source), "target": str(map.target)}
    metadata = {HEADER: json.dumps({**fields, "facts": asdict(facts), "more": more})}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return replace_whole(path, lambda partial: save_file(plain, partial, metadata))


def saved_hashes(fields: Mapping[str, Any]) -> ModelHashes:
    """The hashes that were saved as these. Raises TypeError where one is no text."""
    return of_types(ModelHashes(**fields), source=TEXT, target=TEXT, source_tokenizer=TEXT, target_tokenizer=TEXT)


def read_map(path: Path, build: Callable[[SavedMap], T]) -> T:
    """`build` of what `write_map` wrote. Raises InvalidInput for any other file, and where `build` cannot use it."""
    with reading(path, "map of Molehunt's"):
        header, tensors = header_and_tensors(path, HEADER)
        if header["schema"] != SCHEMA:
            raise ValueError(f"its schema is {header['schema']}, not {SCHEMA}")
        if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
            raise ValueError(f"{broken[0]} holds values that are no number")
        facts: dict[str, Any] = {**header["facts"], "models": saved_hashes(header["facts"]["models"])}
        return build(
            SavedMap(
                kind=header["kind"],
                source=Site.parse(header["source"]),
                target=Site.parse(header["target"]),
                facts=of_types(MapFacts(**facts), method=str, tokens=int),
                more=header["more"],
                tensors=tensors,
            )
        )
