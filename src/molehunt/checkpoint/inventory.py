"""The tensors that a safetensors file really holds, read from its header alone and checked byte for byte.

The header is parsed here, strictly, and not by a loader. Loaders accept duplicate keys, NUL in names and empty files,
and two loaders can disagree on what such a file contains.
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
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _broken(path, f"its header has the key {printable(repr(twice), 80)} twice")
        return found

    def number(text: str) -> int:
        if len(text) > 19:
            raise _broken(path, "its header holds a number of more than 19 digits")
        return int(text)

    try:
        header: object = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_int=number)
    except (ValueError, RecursionError):
        raise _broken(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    return header


def _entries(path: Path, header: dict[str, Any], data: int) -> dict[str, Entry]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
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
    start, end = offsets
    wanted = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if end - start != wanted:
        raise _broken(path, f"{printable(name)} has offsets for {end - start} bytes; its shape and dtype take {wanted}")
    return Entry(name, dtype, tuple(shape), start, end)


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _broken(path: Path, what: str) -> InvalidInput:
    return InvalidInput(f"{printable(path.name)} is not a valid safetensors file: {what}.\nFetch the file again.")
