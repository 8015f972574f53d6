"""The header parser refuses whatever the format does not allow, and nothing else escapes it."""

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from folders import header_file
from molehunt.checkpoint.inventory import MAX_HEADER, MAX_TENSORS, read_header
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


names = st.text(min_size=1, max_size=5)
numbers = st.integers(-2, 40)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F7"]),
        "shape": st.lists(numbers, max_size=2),
        "data_offsets": st.lists(numbers, min_size=1, max_size=3),
    }
)


@given(header=st.dictionaries(names, entries, max_size=3), size=st.integers(0, 60))
def test_what_is_accepted_safetensors_accepts_too(
    tmp_path_factory: pytest.TempPathFactory, header: dict, size: int
) -> None:
    path = header_file(tmp_path_factory.mktemp("f") / "a.safetensors", json.dumps(header).encode(), b"x" * size)
    try:
        found = read_header(path)
    except InvalidInput:
        return
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == set(found)
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            assert tuple(opened.get_slice(name).get_shape()) == found[name].shape


@given(st.binary(max_size=200))
def test_random_bytes_raise_invalid_input_alone(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("f") / "a.safetensors"
    path.write_bytes(raw)
    with pytest.raises(InvalidInput):
        read_header(path)
