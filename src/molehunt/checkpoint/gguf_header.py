"""The header of a GGUF file, read strictly before any library opens it.

A reader that trusts the counts in a header asks for memory or loops for as long as an attacker likes. Here every count is
compared with the bytes that are left, and every tensor with the end of the file.

Source: the specification in `docs/gguf.md` of ggml; limits and the order of checks as in llama.cpp's `gguf_init_from_file`.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from molehunt.errors import InvalidInput, NotTestable, printable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_TENSORS, MAX_KEYS = 100_000, 10_000
MAX_ELEMENTS = 8_000_000
"""Greatest number of entries of one array: a vocabulary, its scores and its merges are the longest."""
MAX_TEXT = 16 * 2**20
"""Greatest number of bytes of one text, such as a chat template."""
MAX_LAYERS = 1000
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's numbers for types of one value, and how `struct` reads them."""
STRING, ARRAY = 8, 9
Value = int | float | bool | str


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file."""

    name: str
    type: str
    """Name of its format, such as `Q4_K`."""
    elements: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What a file says about itself."""

    values: Mapping[str, Value]
    """Keys with one value; arrays are only counted."""
    arrays: Mapping[str, int]
    """Number of entries of each array."""
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """`general.architecture`, such as `llama`; empty where the file has none."""
        return str(self.values.get("general.architecture", ""))

    @property
    def elements(self) -> int:
        """Number of weights in all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    def templates(self) -> dict[str, str]:
        """Chat templates beside the default one, by name."""
        start = "tokenizer.chat_template."
        return {key.removeprefix(start): str(text) for key, text in self.values.items() if key.startswith(start)}


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a GGUF file, checked against the file's size.

    Raises:
        InvalidInput: the file is not what the format allows. No bytes raise any other error but NotTestable.
        NotTestable: a part of a split model, or no language model (an adapter, a control vector, an image encoder).
    """
    size = path.stat().st_size
    if size < 24:
        raise _broken(path, f"it is {size} bytes long, and a header alone takes 24")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        try:
            header, data_start, extents = _parsed(path, _Cursor(path, raw))
        except struct.error:
            raise _broken(path, "its header is cut off") from None
        except UnicodeDecodeError:
            raise _broken(path, "a name or text in it is not UTF-8") from None
    _check_extents(path, extents, size - data_start)
    _check_kind(path, header)
    return header


class _Cursor:
    """Reads values one after the other, and never beyond the end."""

    def __init__(self, path: Path, raw: mmap.mmap) -> None:
        self._path, self._raw, self.at = path, raw, 0

    @property
    def left(self) -> int:
        return len(self._raw) - self.at

    def take(self, layout: str) -> Value:
        (value,) = struct.unpack_from(f"<{layout}", self._raw, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return value

    def count(self, what: str, most: int, smallest: int) -> int:
        """A count of things that take at least `smallest` bytes each."""
        n = int(self.take("Q"))
        if n > most or n * smallest > self.left:
            raise _broken(
                self._path, f"it claims {n} {what}; {min(most, self.left // smallest)} is the most there can be"
            )
        return n

    def text(self, most: int = MAX_TEXT) -> str:
        n = self.count("bytes of text", most, 1)
        self.at += n
        return self._raw[self.at - n : self.at].decode("utf-8")

    def skip_texts(self, n: int) -> None:
        for _ in range(n):
            length = self.count("bytes of text", MAX_TEXT, 1)  # which moves on itself
            self.at += length

    def skip(self, n: int) -> None:
        if n > self.left:
            raise _broken(self._path, "its header is cut off")
        self.at += n


def _parsed(path: Path, cursor: _Cursor) -> tuple[GgufHeader, int, list[tuple[str, int, int]]]:
    """The header, where the tensors begin, and each tensor's name, offset and number of bytes."""
    magic = struct.pack("<I", int(cursor.take("I")))
    if magic != MAGIC:
        raise _broken(path, "it does not begin with GGUF")
    version = int(cursor.take("I"))
    if version not in VERSIONS:
        raise _broken(path, f"it has version {version}; {VERSIONS[0]} and {VERSIONS[1]}, little-endian, are read")
    n_tensors = cursor.count("tensors", MAX_TENSORS, 24)
    n_keys = cursor.count("keys", MAX_KEYS, 13)
    values: dict[str, Value] = {}
    arrays: dict[str, int] = {}
    for _ in range(n_keys):
        key = cursor.text(65535)
        if key in values or key in arrays:
            raise _broken(path, f"the key {printable(repr(key), 80)} stands in it twice")
        kind = int(cursor.take("I"))
        if kind == ARRAY:
            arrays[key] = _skip_array(path, cursor, key)
        else:
            values[key] = _value(path, cursor, kind, key)
    tensors: list[GgufTensor] = []
    extents: list[tuple[str, int, int]] = []
    for _ in range(n_tensors):
        tensor, offset, length = _tensor(path, cursor)
        tensors.append(tensor)
        extents.append((tensor.name, offset, length))
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise _broken(path, "two of its tensors have one name")
    edge = values.get("general.alignment", 32)
    if type(edge) is not int or not 0 < edge <= 2**20 or edge & (edge - 1):
        raise _broken(path, f"its alignment is {printable(str(edge), 40)}, which is no power of two")
    header = GgufHeader(values=values, arrays=arrays, tensors=tuple(tensors))
    return header, -(-cursor.at // edge) * edge, extents


def _value(path: Path, cursor: _Cursor, kind: int, key: str) -> Value:
    if kind == STRING:
        return cursor.text()
    if kind not in SCALARS:
        raise _broken(path, f"{printable(repr(key), 80)} has the unknown type {kind}")
    return cursor.take(SCALARS[kind])


def _skip_array(path: Path, cursor: _Cursor, key: str) -> int:
    """Pass over an array and return its length. Arrays of arrays are in no model."""
    kind = int(cursor.take("I"))
    if kind == STRING:
        n = cursor.count("entries of an array", MAX_ELEMENTS, 8)
        cursor.skip_texts(n)
        return n
    if kind not in SCALARS:
        raise _broken(path, f"{printable(repr(key), 80)} is an array of the unknown type {kind}")
    n = cursor.count("entries of an array", MAX_ELEMENTS, struct.calcsize(SCALARS[kind]))
    cursor.skip(n * struct.calcsize(SCALARS[kind]))
    return n


def _tensor(path: Path, cursor: _Cursor) -> tuple[GgufTensor, int, int]:
    """A tensor, its offset in the data, and the number of its bytes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.text(1024)
    shown = printable(repr(name), 80)
    dims = int(cursor.take("I"))
    if not 0 < dims <= 4 or "\0" in name or not name:
        raise _broken(path, f"the tensor {shown} has {dims} dimensions")
    shape = [int(cursor.take("Q")) for _ in range(dims)]
    kind, offset = int(cursor.take("I")), int(cursor.take("Q"))
    sizes = {known.value: known for known in GGMLQuantizationType if known in GGML_QUANT_SIZES}
    if kind not in sizes:
        raise _broken(path, f"the tensor {shown} has the format {kind}, which the installed gguf does not know")
    block, width = GGML_QUANT_SIZES[sizes[kind]]
    elements = math.prod(shape)
    if not 0 < elements < 2**48 or shape[0] % block:
        raise _broken(path, f"the tensor {shown} has the shape {shape[::-1]}, which does not fit {sizes[kind].name}")
    return GgufTensor(name, sizes[kind].name, elements), offset, elements // block * width


def _check_extents(path: Path, extents: list[tuple[str, int, int]], data: int) -> None:
    if not extents:
        raise _broken(path, "it holds no tensor")
    reached = 0
    for name, offset, length in sorted(extents, key=lambda one: one[1]):
        shown = printable(repr(name), 80)
        if offset < reached:
            raise _broken(path, f"the tensor {shown} overlaps the one before it")
        reached = offset + length
        if reached > data:
            raise _broken(path, f"it is cut off: the tensor {shown} ends {reached - data} bytes behind the file's end")


def _check_kind(path: Path, header: GgufHeader) -> None:
    """Refuse by name what is no whole language model."""
    shown, kind = printable(path.name), printable(header.architecture, 40)
    parts = header.values.get("split.count", 0)
    if type(parts) is int and parts > 1:
        raise NotTestable(
            f"{shown} is one of {parts} parts of a split model.\nJoin them with `llama-gguf-split --merge`, and give that file."
        )
    if kind in ("controlvector", "clip") or header.values.get("general.type") in ("adapter", "mmproj", "imatrix"):
        raise NotTestable(
            f"{shown} is no language model but {printable(str(header.values.get('general.type', kind)), 40)}."
        )
    layers = header.values.get(
        f"{header.architecture}.block_count", 1
    )  # without it, the architecture's own number holds
    if type(layers) is not int or not 0 < layers <= min(MAX_LAYERS, len(header.tensors)):
        raise _broken(path, f"it claims {printable(str(layers), 40)} blocks and has {len(header.tensors)} tensors")


def _broken(path: Path, what: str) -> InvalidInput:
    return InvalidInput(f"{printable(path.name)} is not a valid GGUF file: {what}.\nFetch the file again.")
