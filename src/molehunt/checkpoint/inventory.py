"""The tensors that a safetensors file really holds, read from its header alone and checked byte for byte.

The header is parsed here, strictly, and not by a loader. What is accepted here, safetensors opens with the same names,
dtypes and shapes. It also opens files that are refused here: duplicate tensors, an empty name or NUL in one, no tensor,
fields beyond the three of the format, formats below 8 bits, more than 64 dimensions, and sizes of 2^63 and above. Two
loaders can disagree on what such a file contains, or torch cannot hold it.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molehunt.errors import InvalidInput, printable

MAX_HEADER = 32 * 2**20
"""Greatest number of bytes of JSON in one header. 200,000 tensors take 16 MB; no real shard has so many."""
MAX_TENSORS = 100_000
MAX_MARKS = 8 * MAX_TENSORS
"""Greatest number of brackets, braces, colons and commas in one header, so that reading it takes a second at most."""
MAX_DIMENSIONS = 64
"""Greatest number of dimensions that torch handles."""
SIZES = 2**63
"""Sizes from here on are refused: torch counts in 64-bit numbers with a sign."""
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64,
}  # fmt: skip
"""Number of bits of one element. Sub-byte formats (F4, F6) are not read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of one file."""

    name: str
    dtype: str
    """Name of the format in the header, such as `BF16`."""
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte in the data, which follows the header."""
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The entries of one safetensors file, by tensor name.

    Raises:
        InvalidInput: the file is not exactly what the format allows. The error names the file and, where possible, the
            tensor. No bytes raise any other error.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise _broken(path, f"it is {size} bytes long, and a header alone takes 8")
        (length,) = struct.unpack("<Q", head)
        if length > MAX_HEADER:
            raise _broken(path, f"its header claims {length} bytes; {MAX_HEADER} is the most that is read")
        if length + 8 > size:
            raise _broken(path, f"its header claims {length} bytes and the file ends after {size - 8}: it is cut off")
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise _broken(path, "its header does not start with a brace")
    return _entries(path, _parse(path, raw), size - 8 - length)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    if any(raw.count(mark) > MAX_MARKS for mark in b"[{:,"):
        raise _broken(path, f"its header describes more than the {MAX_TENSORS} tensors that are read")
    try:
        header: object = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_Unique(path),
            parse_int=lambda text: int(text) if len(text) < 20 and text[0] != "-" else _refuse_number(path, text),
            parse_float=lambda text: _refuse_number(path, text),
            parse_constant=lambda text: _refuse_number(path, text),
        )
    except (ValueError, RecursionError):
        raise _broken(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    return header


@dataclass(frozen=True, slots=True)
class _Unique:
    """Makes dicts of JSON objects whose keys are text that UTF-8 can write, each one once."""

    path: Path

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _broken(self.path, f"its header has the key {printable(repr(key), 80)} twice")
            if not _is_text(key):
                raise _broken(self.path, f"its header has the key {printable(repr(key), 80)}, half of a character")
            found[key] = value
        return found


def _refuse_number(path: Path, text: str) -> int:
    if len(text) > 19:
        raise _broken(path, "its header holds a number of more than 19 digits")
    raise _broken(path, f"its header holds {printable(text)}: its shapes and offsets are not all natural numbers")


def _is_text(text: str) -> bool:
    """Whether UTF-8 can write `text`: half of a surrogate pair, which JSON can spell, is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _entries(path: Path, header: dict[str, Any], data: int) -> dict[str, Entry]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) and _is_text(v) for v in metadata.values()):
        raise _broken(path, "its __metadata__ is not a map of strings")
    if not header:
        raise _broken(path, "it holds no tensor")
    if len(header) > MAX_TENSORS:
        raise _broken(path, f"it claims {len(header)} tensors; {MAX_TENSORS} is the most that is read")
    found = {name: _entry(path, name, fields) for name, fields in header.items()}
    reached = 0
    for entry in sorted(found.values(), key=lambda e: (e.start, e.end)):
        if entry.start != reached:
            what = "overlaps the one before it" if entry.start < reached else "leaves a hole before it"
            raise _broken(path, f"{printable(entry.name)} {what}")
        reached = entry.end
    if reached != data:
        what = "is cut off" if reached > data else "has bytes after its last tensor"
        raise _broken(path, f"it {what}: tensors take {reached} bytes and {data} are there")
    return found


def _entry(path: Path, name: str, fields: object) -> Entry:
    if "\0" in name or not name:
        raise _broken(path, f"a tensor is called {printable(repr(name), 80)}")
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"{printable(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(path, f"{printable(name)} has the dtype {printable(repr(dtype), 40)}, which is not read")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _broken(path, f"{printable(name)} has a shape or offsets that are not natural numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise _broken(path, f"{printable(name)} has {len(shape)} dimensions; {MAX_DIMENSIONS} is the most that is read")
    start, end = offsets
    if math.prod(size for size in shape if size) * DTYPE_BITS[dtype] >= SIZES:  # loaders multiply before they see a 0
        raise _broken(path, f"{printable(name)} has a shape that no memory holds: {_few(shape)}")
    wanted = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if end - start != wanted:
        raise _broken(path, f"{printable(name)} has offsets for {end - start} bytes; its shape and dtype take {wanted}")
    return Entry(name, dtype, tuple(shape), start, end)


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < SIZES for v in values)


def _few(shape: list[int]) -> str:
    """The first sizes of a shape that may have dozens."""
    return f"[{', '.join(map(str, shape[:4]))}{', …' if len(shape) > 4 else ''}]"


def _broken(path: Path, what: str) -> InvalidInput:
    return InvalidInput(f"{printable(path.name)} is not a valid safetensors file: {what}.\nFetch the file again.")
