"""The header parser refuses whatever the format does not allow, and nothing else escapes it."""

import json
import math
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from folders import header_file
from molehunt.checkpoint.inventory import DTYPE_BITS, MAX_HEADER, MAX_TENSORS, read_header
from molehunt.errors import InvalidInput

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {
    "truncated": ({"w": GOOD}, b"1234", None, "cut off"),
    "trailing bytes": ({"w": GOOD}, b"x" * 9, None, "bytes after"),
    "overlap": ({"v": GOOD, "w": {**GOOD, "data_offsets": [4, 12]}}, b"x" * 12, None, "overlaps"),
    "hole": ({"v": GOOD, "w": {**GOOD, "data_offsets": [12, 20]}}, b"x" * 20, None, "hole"),
    "shape and offsets": ({"w": {**GOOD, "shape": [3]}}, b"x" * 8, None, "take 12"),
    "2^62 header": ({"w": GOOD}, b"", 2**62, "claims"),
    "header past the end": ({"w": GOOD}, b"", 4000, "cut off"),
    "negative offset": ({"w": {**GOOD, "data_offsets": [-8, 0]}}, b"", None, "natural numbers"),
    "negative shape": ({"w": {**GOOD, "shape": [-2]}}, b"x" * 8, None, "natural numbers"),
    "bool in shape": ({"w": {**GOOD, "shape": [True]}}, b"x" * 4, None, "natural numbers"),
    "bad dtype": ({"w": {**GOOD, "dtype": "F7"}}, b"x" * 8, None, "F7"),
    "duplicate key": (b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{}}', b"x" * 8, None, "twice"),
    "leading space": (b' {"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"x" * 8, None, "brace"),
    "NUL in a name": ({"w\0": GOOD}, b"x" * 8, None, "called"),
    "empty name": ({"": GOOD}, b"x" * 8, None, "called"),
    "zero tensors": ({}, b"", None, "no tensor"),
    "metadata alone": ({"__metadata__": {"a": "b"}}, b"", None, "no tensor"),
    "metadata not strings": ({"__metadata__": {"a": 1}, "w": GOOD}, b"x" * 8, None, "__metadata__"),
    "unknown field": ({"w": {**GOOD, "more": 1}}, b"x" * 8, None, "described"),
    "huge number": (b'{"w":{"dtype":"F32","shape":[' + b"9" * 30 + b'],"data_offsets":[0,8]}}', b"", None, "19 digits"),
    "sizes whose product has 4,700 digits": ({"w": {**GOOD, "shape": [2**62] * 64}}, b"", None, "no memory"),
    "huge sizes behind a zero": (
        {"w": {**GOOD, "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}},
        b"",
        None,
        "memory",
    ),
    "a zero behind huge sizes": (
        {"w": {**GOOD, "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}},
        b"",
        None,
        "memory",
    ),
    "65 dimensions": ({"w": {**GOOD, "shape": [1] * 64 + [2]}}, b"x" * 8, None, "65 dimensions"),
    "minus zero in a shape": (b'{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b"", None, "natural numbers"),
    "minus zero as an offset": (b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,-0]}}', b"", None, "holds -0"),
    "exponent": (b'{"w":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', b"x" * 8, None, "holds 2e0"),
    "NaN": (b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', b"x" * 8, None, "holds NaN"),
    "half a character in a name": (b'{"a\\udc00":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x", None, "udc00"),
    "half a character in metadata": ({"__metadata__": {"a": "\ud801"}, "w": GOOD}, b"x" * 8, None, "__metadata__"),
    "half a character as a key of metadata": ({"__metadata__": {"\ud801": "a"}, "w": GOOD}, b"x" * 8, None, "half"),
    "duplicate field": (b'{"w":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x", None, "twice"),
    "not JSON": (b"{nope", b"", None, "not JSON"),
    "deep nesting": (b'{"a":' * 5000 + b"1" + b"}" * 5000, b"", None, ""),
}


@pytest.mark.parametrize("case", BAD)
def test_a_broken_header_is_refused_by_name(tmp_path: Path, case: str) -> None:
    header, data, length, says = BAD[case]
    path = header_file(tmp_path / "shard.safetensors", header, data, length)
    with pytest.raises(InvalidInput, match=r"shard\.safetensors") as refused:
        read_header(path)
    assert says in str(refused.value)


def test_a_file_shorter_than_a_length(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1234")
    with pytest.raises(InvalidInput, match="4 bytes long"):
        read_header(tmp_path / "a.safetensors")


def test_too_many_tensors_and_too_long_a_header(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = header_file(tmp_path / "a.safetensors", {f"t{i}": empty for i in range(MAX_TENSORS + 1)})
    with pytest.raises(InvalidInput, match="is the most"):
        read_header(path)
    path = tmp_path / "b.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER + 1) + b" " * 8)
    with pytest.raises(InvalidInput, match="is the most"):
        read_header(path)


def test_a_good_header_is_read(tmp_path: Path) -> None:
    path = header_file(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}, "w": GOOD}, b"x" * 8)
    (entry,) = read_header(path).values()
    assert (entry.name, entry.dtype, entry.shape, entry.start, entry.end) == ("w", "F32", (2,), 0, 8)


def _many(item: str, separator: str = ",") -> str:
    """As many copies of `item` as the longest header that is read can hold."""
    return separator.join([item] * ((MAX_HEADER - 200) // (len(item) + 1)))


SLOW = {
    "the last key twice": lambda: "{" + ",".join(f'"k{i}":0' for i in [*range(60_000), 59_999]) + "}",
    "sizes of one tensor": lambda: '{"w":{"dtype":"F32","shape":[' + _many("9223372036854775807") + '],"data_offsets":[0,0]}}',
    "zeros": lambda: '{"w":{"dtype":"F32","shape":[' + _many("0") + '],"data_offsets":[0,0]}}',
    "as many zeros as a header may hold": lambda: '{"w":{"dtype":"F32","shape":[' + ",".join(["0"] * 790_000) + '],"data_offsets":[0,0]}}',
    "lists": lambda: '{"w":{"dtype":"F32","shape":[' + _many("[]") + '],"data_offsets":[0,0]}}',
    "objects": lambda: '{"w":{"dtype":"F32","shape":[' + _many("{}") + '],"data_offsets":[0,0]}}',
    "nulls": lambda: '{"w":{"dtype":"F32","shape":[' + _many("null") + '],"data_offsets":[0,0]}}',
    "brackets": lambda: '{"w":' + "[" * (MAX_HEADER - 200) + "}",
    "keys": lambda: "{" + ",".join(f'"{i}":0' for i in range(900_000)) + "}",
    "spaces": lambda: '{"w":' + " " * (MAX_HEADER - 200) + "}",
    "one name": lambda: '{"' + "n" * (MAX_HEADER - 200) + '":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
}  # fmt: skip


@pytest.mark.parametrize("case", SLOW)
def test_a_header_made_to_take_long_is_refused_at_once(tmp_path: Path, case: str) -> None:
    path = header_file(tmp_path / "a.safetensors", SLOW[case]().encode())
    begun = time.process_time()
    with pytest.raises(InvalidInput) as refused:
        read_header(path)
    assert time.process_time() - begun < 2
    assert len(str(refused.value)) < 400


COUNT = st.sampled_from(["0", "1", "2", "3", "4", "8", "-0", "-1", "1.0", "1e0", "null", "true", '"1"', str(2**62)])
NAME = st.sampled_from(['""', '"w"', '"v"', '"\\u0077"', '"\\ud800"', '"\\ud83d\\ude42"', '"é\t"', '"é"', '"a.b"'])
DTYPE = st.sampled_from([f'"{name}"' for name in (*DTYPE_BITS, "F4", "F8_E4M3FN", "f32", "")] + ["null", "3"])
LIST = st.lists(COUNT, max_size=3).map(lambda items: f"[{','.join(items)}]")
FIELD = st.one_of(
    DTYPE.map('"dtype":{}'.format), LIST.map('"shape":{}'.format), LIST.map('"data_offsets":{}'.format), st.just('"x":1')
)  # fmt: skip


@st.composite
def _fitting(draw: st.DrawFn) -> tuple[str, int]:
    """A header that is well formed, and the number of bytes of data that it describes."""
    parts, reached = [], 0
    for name in draw(st.lists(st.sampled_from(["w", "é", "a.b", "\x7f", "🙂", "__metadata"]), min_size=1, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPE_BITS))), draw(st.lists(st.integers(0, 3), max_size=3))
        end = reached + math.prod(shape) * DTYPE_BITS[dtype] // 8
        fields = {"dtype": dtype, "shape": shape, "data_offsets": [reached, end]}
        items = draw(st.permutations([f'"{key}": {json.dumps(value)}' for key, value in fields.items()]))
        parts.append(f"{json.dumps(name, ensure_ascii=draw(st.booleans()))}: {{{', '.join(items)}}}")
        reached = end
    metadata = draw(st.sampled_from([[], ['"__metadata__": {"format": "pt"}'], ['"__metadata__": {}']]))
    return "{" + ",".join(draw(st.permutations([*parts, *metadata]))) + "}", reached


def _safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Name, dtype and shape of every tensor as safetensors opens them, each one loaded; None if it refuses the file."""
    try:
        with safe_open(path, framework="pt") as opened:
            found = {}
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
                assert opened.get_tensor(name).shape == torch.Size(found[name][1])
            return found
    except SafetensorError:
        return None


@settings(max_examples=200)
@given(fitting=_fitting())
def test_a_well_formed_header_is_read_as_safetensors_reads_it(
    tmp_path_factory: pytest.TempPathFactory, fitting: tuple[str, int]
) -> None:
    header, size = fitting
    path = header_file(tmp_path_factory.mktemp("f") / "a.safetensors", header.encode(), b"\0" * size)
    found = {name: (entry.dtype, entry.shape) for name, entry in read_header(path).items()}
    assert found == _safetensors(path)


@settings(max_examples=200)
@given(
    entries=st.lists(st.tuples(NAME, st.lists(FIELD, min_size=3, max_size=4)), max_size=3),
    fitting=_fitting(),
    cut=st.integers(0, 80),
    size=st.integers(0, 16),
)
def test_what_is_accepted_safetensors_accepts_too(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[str, list[str]]],
    fitting: tuple[str, int],
    cut: int,
    size: int,
) -> None:
    made = "{" + ",".join(f"{name}:{{{','.join(fields)}}}" for name, fields in entries) + "}"
    mixed = fitting[0][:cut] + made[cut:]  # often no JSON, and often JSON that nobody would write
    for header in (made, mixed):
        path = header_file(tmp_path_factory.mktemp("f") / "a.safetensors", header.encode(), b"\0" * size)
        try:
            found = read_header(path)
        except InvalidInput:
            continue
        assert {name: (entry.dtype, entry.shape) for name, entry in found.items()} == _safetensors(path)


@given(st.binary(max_size=200))
def test_random_bytes_raise_invalid_input_alone(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("f") / "a.safetensors"
    path.write_bytes(raw)
    with pytest.raises(InvalidInput):
        read_header(path)
