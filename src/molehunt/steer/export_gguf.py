"""Steering vectors as GGUF control vectors, which llama.cpp adds with `--control-vector`, and back.

The file has `general.architecture` = `controlvector`, the strings and counts `controlvector.model_hint` and
`controlvector.layer_count`, and one fp32 tensor `direction.N` for each block. N is the 0-based decoder block whose output
it is added to, as in `Site(N)`: llama.cpp adds it after the block's last residual sum, at every token, prompt included.
llama.cpp has no place for `direction.0` and refuses a whole file that holds one; repeng skips that block when it writes.

Source: llama.cpp `common_control_vector_load_one`, `llama_adapter_cvec` and its `cvector-generator`; repeng's
`ControlVector.export_gguf`.
"""

import logging
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.run.extras import install_command
from molehunt.run.whole import replace_whole
from molehunt.steer.vector import SteeringVector, VectorFacts

log = logging.getLogger(__name__)
ARCHITECTURE = "controlvector"
MAX_FILE, MAX_HEADER = 256 * 2**20, 2**20
"""Greatest number of bytes that are read. A control vector of 100 blocks of width 16,384 takes 7 MB."""
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's numbers for types of one value, and how `struct` reads them."""
STRING, ARRAY, F32 = 8, 9, 0
_NAME = re.compile(r"direction\.([1-9]\d{0,5})")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What a file of another program holds of a steering vector."""

    path: Path
    blocks: tuple[int, ...]
    left_out: tuple[int, ...]
    """Blocks that it has no place for."""


def write_gguf(vector: SteeringVector, path: Path, *, model_hint: str) -> Exported:
    """Write the vector as a control vector, replaced whole. Block 0 is left out with a warning: see the module.

    Args:
        vector: written at strength 1; scale it first for another strength.
        path: the file to write, such as `vector.gguf`.
        model_hint: the architecture as llama.cpp calls it, such as `llama` or `qwen2`: that of the model's GGUF.

    Raises:
        UsageError: the vector acts on block 0 alone, or the package `gguf` is missing.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError(f"writing a control vector needs an extra: {install_command('exports')}") from None
    blocks = tuple(layer for layer in sorted(vector.vectors) if layer > 0)
    left_out = tuple({*vector.vectors} - {*blocks})
    if not blocks:
        raise UsageError(
            "this vector acts on block 0 alone, which llama.cpp cannot steer.\nFit one at a later block, or orthogonalise."
        )
    if left_out:
        log.warning("llama.cpp cannot steer block 0: it is left out of %s", printable(path.name))

    def write(partial: Path) -> None:
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(blocks))
        for layer in blocks:
            writer.add_tensor(f"direction.{layer}", vector.vectors[layer].float().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return Exported(path=replace_whole(path, write), blocks=blocks, left_out=left_out)


def read_gguf(path: Path, *, n_layers: int) -> SteeringVector:
    """The steering vector that a control-vector file holds. The header is parsed here, strictly and in bounds.

    Args:
        path: a file of `write_gguf`, repeng or llama.cpp's `cvector-generator`.
        n_layers: number of decoder blocks of the model that it is for, which the file does not say.

    Raises:
        InvalidInput: the file is broken, or no control vector that llama.cpp would take; nothing else escapes.
        UsageError: it acts on a block that a model of `n_layers` does not have.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise _broken(path, f"it is larger than {MAX_FILE >> 20} MB, which no control vector is")
        raw = path.read_bytes()
        fields, infos, start = _header(path, raw)
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, printable(str(error), 200)) from None
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise _broken(path, f"its architecture is {printable(repr(architecture), 60)}, not {ARCHITECTURE!r}")
    if not infos:
        raise _broken(path, "it holds no direction")
    vectors = dict(_direction(path, raw, start, info) for info in infos)
    if len(vectors) != len(infos) or len({len(vector) for vector in vectors.values()}) != 1:
        raise _broken(path, "a direction is there twice, or two have different widths")
    if max(vectors) >= n_layers:
        raise UsageError(
            f"{printable(path.name)} acts on block {max(vectors)}; a model of {n_layers} blocks has 0 to {n_layers - 1}."
        )
    hint = printable(str(fields.get(f"{ARCHITECTURE}.model_hint", "unknown")), 40)
    d_model = len(next(iter(vectors.values())))
    return SteeringVector(vectors, VectorFacts(method=f"control vector for {hint}", n_layers=n_layers, d_model=d_model))


class _Info(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Reader:
    """Takes values off the header's bytes, and never past their end."""

    def __init__(self, path: Path, raw: bytes) -> None:
        self.path, self.raw, self.at = path, raw[:MAX_HEADER], 0

    def bytes(self, count: int) -> bytes:
        if count > len(self.raw) - self.at:
            raise _broken(self.path, "its header is cut off or longer than a control vector's")
        self.at += count
        return self.raw[self.at - count : self.at]

    def number(self, kind: str) -> int | float | bool:
        return struct.unpack(f"<{kind}", self.bytes(struct.calcsize(f"<{kind}")))[0]

    def count(self, kind: str = "Q") -> int:
        return int(self.number(kind))

    def string(self) -> str:
        return self.bytes(self.count()).decode()

    def value(self, kind: int) -> object:
        """A value of a metadata field; arrays are stepped over."""
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        inner, length = (self.count("I"), self.count()) if kind == ARRAY else (kind, 0)
        if inner == STRING:
            for _ in range(length):
                self.string()
        elif inner in SCALARS:
            self.bytes(length * struct.calcsize(f"<{SCALARS[inner]}"))
        else:
            raise _broken(self.path, f"its header has a field of type {inner}, which is not known")
        return None


def _header(path: Path, raw: bytes) -> tuple[dict[str, object], list[_Info], int]:
    """Fields, tensors, and where the data start."""
    reader = _Reader(path, raw)
    if reader.bytes(4) != b"GGUF":
        raise _broken(path, "it does not start with GGUF")
    version, tensors, pairs = reader.count("I"), reader.count(), reader.count()
    if version not in (2, 3):
        raise _broken(path, f"it says version {version}; 2 and 3, with the low byte first, are read")
    fields: dict[str, object] = {}
    for _ in range(pairs):  # each takes bytes of the header, which ends
        key = reader.string()
        if key in fields:
            raise _broken(path, f"its header has {printable(repr(key), 60)} twice")
        fields[key] = reader.value(reader.count("I"))
    infos: list[_Info] = []
    for _ in range(tensors):
        name, dims = reader.string(), reader.count("I")
        if dims > 4:
            raise _broken(path, f"{printable(name)} has {dims} dimensions")
        shape = tuple(reader.count() for _ in range(dims))
        infos.append(_Info(name, shape, reader.count("I"), reader.count()))
    aligned = fields.get("general.alignment", 32)
    if type(aligned) is not int or not 0 < aligned <= 2**16 or aligned & (aligned - 1):
        raise _broken(path, f"its alignment is {printable(repr(aligned), 40)}, which is no power of two")
    return fields, infos, -(-reader.at // aligned) * aligned


def _direction(path: Path, raw: bytes, start: int, info: _Info) -> tuple[int, Float[Tensor, " d_model"]]:
    found = _NAME.fullmatch(info.name)
    if found is None:
        raise _broken(path, f"its tensor {printable(info.name)} is no direction of a block from 1 on")
    if info.kind != F32 or len(info.shape) != 1 or not info.shape[0]:
        raise _broken(path, f"{info.name} is no row of fp32 numbers")
    begin, count = start + info.offset, info.shape[0]
    if begin + 4 * count > len(raw):
        raise _broken(path, f"{info.name} reaches past the end of the file")
    vector = torch.frombuffer(bytearray(raw[begin : begin + 4 * count]), dtype=torch.float32)
    if not bool(vector.isfinite().all()):
        raise _broken(path, f"{info.name} holds values that are no number")
    return int(found[1]), vector


def _broken(path: Path, what: str) -> InvalidInput:
    return InvalidInput(f"{printable(path.name)} is no control vector that can be read: {what}.")
