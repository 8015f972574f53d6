"""A checkpoint on disk, read as loaders would read it: one tensor at a time, and without executing anything."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from molehunt.checkpoint.adapter_folder import adapter_traps, check_adapter_weights, inner_adapters, is_adapter_folder
from molehunt.checkpoint.adapter_settings import AdapterSettings, parse_adapter
from molehunt.checkpoint.config_limits import check_config
from molehunt.checkpoint.gguf_facts import converted_roundings
from molehunt.checkpoint.inventory import Entry, read_header
from molehunt.checkpoint.layout import Layout, lay_out
from molehunt.checkpoint.links import fetch_again, model_name, refuse_links
from molehunt.checkpoint.loader_traps import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Trap,
    adapter_beside,
    folder_traps,
    read_json,
    refuse_large,
)
from molehunt.checkpoint.packed_weights import PackedWeight, packed_weights
from molehunt.checkpoint.quantised import Quantisation, recognise
from molehunt.errors import InvalidInput, UsageError, printable

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
READ_BY_LOADERS = (".json", ".jinja", ".model", ".txt", ".safetensors", ".py")
AdapterChoice = Literal["refuse", "use", "ignore"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """A model folder or an adapter folder. Open it with `Checkpoint.open`."""

    path: Path
    kind: Literal["model", "adapter"]
    config: dict[str, Any]
    """config.json, or adapter_config.json for an adapter."""
    layout: Layout
    findings: tuple[Trap, ...]
    """Points on which loaders may disagree about this folder."""
    quantisation: Quantisation | None

    @classmethod
    def open(cls, path: str | Path, *, adapter: AdapterChoice = "refuse") -> "Checkpoint":
        """Read the headers of a folder.

        Args:
            path: a local folder.
            adapter: whether an adapter beside full weights is applied. "use" opens the weights and adds a finding;
                weights are compared without the adapter.

        Raises:
            UsageError: no such folder, or `adapter` must be given.
            InvalidInput: something in the folder is broken or refused.
            NotTestable: a quantisation that is not known.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise UsageError(f"{printable(str(path))} is not a folder.")
        refuse_links(folder)
        refuse_large(folder)
        if is_adapter_folder(folder):
            return cls._open_adapter(folder)
        if not (folder / "config.json").is_file():
            inner = inner_adapters(folder)
            here = f"\nIt holds adapters in subfolders; give one: {printable(', '.join(inner), 200)}." if inner else ""
            raise InvalidInput(
                f"{printable(model_name(folder))} has neither config.json nor {ADAPTER_CONFIG}: no model folder.{here}{fetch_again(folder)}"
            )
        config = read_json(folder / "config.json")
        check_config(config)
        layout = lay_out(folder, config)
        entries = {name: entry for file in layout.files for name, entry in layout.entries[file].items()}
        quantisation = recognise(config, entries)
        findings = (
            *layout.traps,
            *folder_traps(folder, config, frozenset(entries)),
            *adapter_beside(folder, adapter),
            *(quantisation.traps() if quantisation is not None else ()),
        )
        return cls(
            path=folder,
            kind="model",
            config=config,
            layout=layout,
            findings=findings,
            quantisation=quantisation,
        )

    @classmethod
    def _open_adapter(cls, folder: Path) -> "Checkpoint":
        config = read_json(folder / ADAPTER_CONFIG)
        parse_adapter(config)
        check_adapter_weights(folder)
        header = read_header(folder / ADAPTER_WEIGHTS)
        layout = Layout(files=(ADAPTER_WEIGHTS,), entries={ADAPTER_WEIGHTS: header}, unread={}, traps=())
        return cls(
            path=folder,
            kind="adapter",
            config=config,
            layout=layout,
            findings=(*folder_traps(folder, {}, frozenset()), *adapter_traps(folder)),
            quantisation=None,
        )

    @property
    def model_type(self) -> str:
        """The model type in config.json; empty for an adapter."""
        return str(self.config.get("model_type", ""))

    @cached_property
    def adapter(self) -> AdapterSettings:
        """How an adapter folder says that it is to be read."""
        return parse_adapter(self.config)

    @cached_property
    def _effective(self) -> dict[str, tuple[str, Entry]]:
        """For each tensor, the file that it is loaded from and its entry there."""
        found: dict[str, tuple[str, Entry]] = {}
        for file in self.layout.files:
            for name, entry in self.layout.entries[file].items():
                found[name] = (file, entry)
        if self.quantisation is not None:
            for name in self.quantisation.scales:
                found.pop(name, None)
            for name, weight in self.packed.items():
                file, entry = found[weight.main]
                for part in weight.parts:
                    found.pop(part, None)
                found[name] = (file, replace(entry, name=name, shape=weight.shape))
        return found

    @cached_property
    def packed(self) -> dict[str, PackedWeight]:
        """Weights that are made of several stored tensors, by the name that a loader gives the weight."""
        if self.quantisation is None:
            return {}
        shapes = {name: entry.shape for file in self.layout.files for name, entry in self.layout.entries[file].items()}
        return packed_weights(shapes, self.quantisation.settings, self._part)

    def names(self) -> tuple[str, ...]:
        """Sorted tensor names. Scales of quantised weights belong to their weights and are not listed."""
        return self._names

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(sorted(self._effective))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as it is stored."""
        return self._effective[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor as it is stored."""
        return DTYPES[self._effective[name][1].dtype]

    def rounding(self, name: str) -> float:
        """Spectral norm of the rounding that a format of few bits made of a matrix; 0 without one."""
        if name in self.packed:
            return self.packed[name].rounding(name, self._part)
        return converted_roundings(self.path).get(name, 0.0)

    def copies(self, name: str) -> tuple[str, ...]:
        """Every safetensors file of the folder with a tensor of that name; the file that is loaded comes last."""
        effective = self._effective[name][0]
        others = [f for f, h in {**self.layout.unread, **self.layout.entries}.items() if name in h and f != effective]
        return (*others, effective)

    def tensor(self, name: str, *, file: str | None = None) -> Tensor:
        """One tensor, which is read now and not cached. Quantised weights are dequantised to fp32.

        Args:
            name: one of `names()`.
            file: one of its `copies`; by default the file that is loaded.

        Raises:
            InvalidInput: the values hold NaN or infinity.
            NotTestable: the weight is quantised in a way that cannot be undone exactly.
        """
        file = file or self._effective[name][0]
        if self.quantisation is not None:
            self.quantisation.refuse_disputed(name)
        if name in self.packed:
            value = self.packed[name].undone(name, self._part)
        elif self.quantisation is not None:
            value = self.quantisation.dequantise(name, self._read(file, name), self._part)
        else:
            value = self._read(file, name)
        if value.is_floating_point() and not all(bool(rows.float().isfinite().all()) for rows in _slices(value)):
            raise InvalidInput(
                f"{printable(name)} in {printable(file)} holds NaN or infinity: no difference to it means anything."
            )
        return value

    def stored(self, name: str) -> Tensor:
        """One tensor as its file holds it: not dequantised, and not looked into for NaN."""
        return self._read(self._effective[name][0], self.packed[name].main if name in self.packed else name)

    def stored_parts(self, name: str) -> dict[str, Tensor]:
        """All that a file holds of one weight: its numbers and, of a quantised one, its scales and whatever is beside them.

        They are named by the end that each adds to the name of the module: `weight`, `qweight`, `weight_scale`.
        """
        module, beside = name.removesuffix("weight"), frozenset[str]()
        if self.quantisation is not None:
            beside = frozenset(part for part in self.quantisation.scales if part.startswith(module))
        parts = self.packed[name].parts if name in self.packed else (name, *beside)
        return {part.removeprefix(module): self._part(part) for part in parts}

    def _part(self, name: str) -> Tensor:
        return self._read(self._stored_in(name), name)

    def _read(self, file: str, name: str) -> Tensor:
        with safe_open(str(self.path / file), framework="pt") as opened:  # pyright: ignore[reportUnknownArgumentType]
            return opened.get_tensor(name)

    def _stored_in(self, name: str) -> str:
        return next(file for file in reversed(self.layout.files) if name in self.layout.entries[file])

    @cached_property
    def _content_hash(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(self.path.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(self.path).parts)  # .cache of a download
            if path.is_file() and path.suffix in READ_BY_LOADERS and not hidden:
                digest.update(
                    f"{path.relative_to(self.path).as_posix()}\0{path.stat().st_size}\0".encode(
                        "utf-8", "surrogateescape"
                    )
                )
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        return digest.hexdigest()

    def content_hash(self) -> str:
        """SHA-256 over names and bytes of every file that loaders read, in hex. It does not change when the folder moves."""
        return self._content_hash


def _slices(value: Tensor) -> tuple[Tensor, ...]:
    """Slices of a few rows: an fp32 copy of the whole tensor would double the memory of a comparison."""
    return torch.atleast_1d(value).split(64)


def paired_names(base: Checkpoint, tuned: Checkpoint) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of tensors in both checkpoints, in the base only, and in the fine-tune only."""
    left, right = frozenset(base.names()), frozenset(tuned.names())
    return tuple(sorted(left & right)), tuple(sorted(left - right)), tuple(sorted(right - left))
