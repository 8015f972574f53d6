"""Ways in which a file can be wrong: its bytes, its fields, and what stands in its place."""

import json
import os
import random
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVIL = "\x1b]0;owned\x07\x1b[2J\u202eevil\u009b31m\u2066"
"""Control sequences, bidirectional marks and C1 characters: none of them may reach a terminal."""
HOLE = "@@HOLE@@"
TOKENS: dict[str, str] = {
    "null": "null",
    "empty text": '""',
    "zero": "0",
    "minus one": "-1",
    "half": "0.5",
    "seven": "7",
    "true": "true",
    "infinite": "1e309",
    "NaN": "NaN",
    "tiny": "1e-320",
    "large float": "1e300",
    "large int": str(10**30),
    "2**31": str(2**31),
    "lone surrogate": r'"\ud800"',
    "empty list": "[]",
    "empty object": "{}",
    "list of null": "[null, [], {}]",
    "object of null": '{"": null, "a": {"b": [0]}}',
    "deep lists": "[" * 5000 + "]" * 5000,
    "deep objects": '{"a":' * 2000 + "1" + "}" * 2000,
    "long text": '"' + "ab " * 100_000 + '"',
    "digits": "9" * 5000,
    "control characters": json.dumps(EVIL),
    "a path out": '"../../../../etc/passwd"',
    "zero byte": r'"a\u0000b"',
    "a pattern that never ends": '"(a+)+$"',
    "a template": '"{% for i in range(10**9) %}{{ i }}{% endfor %}"',
}
"""What a JSON value is replaced by, as it stands in the file."""


@dataclass(frozen=True)
class Mutation:
    """One way in which one file is wrong."""

    label: str
    apply: Callable[[Path], None]
    """Changes the file at a path, which no other input shares."""


def byte_mutations(rng: random.Random, n: int) -> Iterator[Mutation]:
    """Cuts, flipped bits, inserted, removed and repeated bytes, at places drawn from `rng`."""

    def cut(raw: bytes, at: int, draw: random.Random) -> bytes:
        return raw[:at]

    def flipped(raw: bytes, at: int, draw: random.Random) -> bytes:
        return raw[:at] + bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1 :]

    def inserted(raw: bytes, at: int, draw: random.Random) -> bytes:
        return raw[:at] + draw.randbytes(draw.choice((1, 7, 300))) + raw[at:]

    def removed(raw: bytes, at: int, draw: random.Random) -> bytes:
        return raw[:at] + raw[at + draw.choice((1, 8, 400)) :]

    def zeroed(raw: bytes, at: int, draw: random.Random) -> bytes:
        size = draw.choice((1, 8, 64))
        return raw[:at] + bytes(size) + raw[at + size :]

    def ones(raw: bytes, at: int, draw: random.Random) -> bytes:
        size = draw.choice((1, 8, 64))
        return raw[:at] + b"\xff" * size + raw[at + size :]

    def repeated(raw: bytes, at: int, draw: random.Random) -> bytes:
        size = draw.choice((1, 16, 1000))
        return raw[:at] + raw[at : at + size] * 3 + raw[at:]

    def swapped(raw: bytes, at: int, draw: random.Random) -> bytes:
        return raw[at:] + raw[:at]

    def digit(raw: bytes, at: int, draw: random.Random) -> bytes:
        places = [i for i in range(max(0, at - 2000), min(len(raw), at + 2000)) if chr(raw[i]).isdigit()]
        if not places:
            return flipped(raw, at, draw)
        place = draw.choice(places)
        return raw[:place] + draw.choice((b"9", b"0", b"-", b"e", b"99999999999")) + raw[place + 1 :]

    kinds = (cut, flipped, inserted, removed, zeroed, ones, repeated, swapped, digit)
    for i in range(n):
        kind, where, seed = kinds[i % len(kinds)], rng.random(), rng.randrange(2**32)

        def apply(path: Path, kind: Any = kind, where: float = where, seed: int = seed) -> None:
            raw = path.read_bytes()
            draw = random.Random(seed)
            head = min(len(raw), 20_000) if draw.random() < 0.6 else len(raw)  # headers and fields stand at the start
            path.write_bytes(kind(raw, int(where * max(1, head - 1)), draw) if raw else draw.randbytes(9))

        yield Mutation(f"bytes: {kind.__name__} at {where:.4f} ({seed})", apply)


def _with(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink()
        make(path)

    return apply


def place_mutations() -> Iterator[Mutation]:
    """What can stand in a file's place."""
    kinds: dict[str, Callable[[Path], object]] = {
        "missing": lambda path: None,
        "empty": lambda path: path.touch(),
        "one zero byte": lambda path: path.write_bytes(b"\0"),
        "a directory": lambda path: path.mkdir(),
        "a pipe": lambda path: os.mkfifo(path),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to nothing": lambda path: path.symlink_to("nowhere"),
        "a link to a device": lambda path: path.symlink_to("/dev/zero"),
        "UTF-16": lambda path: path.write_bytes('{"a": "b"}'.encode("utf-16")),
        "bad UTF-8": lambda path: path.write_bytes(b'{"a": "\xff\xfe\xed\xa0\x80"}'),
        "a marked order of bytes": lambda path: path.write_bytes(b"\xef\xbb\xbf{}"),
        "deep lists": lambda path: path.write_bytes(b"[" * 200_000),
        "large": lambda path: path.write_bytes(b" " * (20 << 20)),
        "a hole of 3 GB": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 3 << 30),
        "a list": lambda path: path.write_bytes(b"[1, 2, 3]"),
        "a text": lambda path: path.write_bytes(b'"text"'),
        "null": lambda path: path.write_bytes(b"null"),
        "a header of zero bytes": lambda path: path.write_bytes(bytes(8)),
        "a header of 2**63 bytes": lambda path: path.write_bytes(struct.pack("<Q", 2**63) + b"{}"),
        "an empty header": lambda path: path.write_bytes(struct.pack("<Q", 2) + b"{}"),
        "control characters": lambda path: path.write_text(json.dumps({EVIL: EVIL}, ensure_ascii=False)),
    }
    for name, make in kinds.items():
        yield Mutation(f"file: {name}", _with(make))
    yield Mutation("file: unreadable", lambda path: path.chmod(0))


def fields(value: Any, path: tuple[Any, ...] = (), widest: int = 2, deepest: int = 5) -> Iterator[tuple[Any, ...]]:
    """The paths to the values of a JSON document: of long lists and objects, to the first few and the last."""
    if path:
        yield path
    if len(path) >= deepest:
        return
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if len(keys) > (40 if not path else 8):
        keys = [*keys[:widest], keys[-1]]
    for key in keys:
        yield from fields(value[key], (*path, key), widest, deepest)


def field_mutations(document: Any) -> Iterator[tuple[str, Callable[[Any], str]]]:
    """For every field and every replacement, what makes the JSON text of a document with it."""
    for path in fields(document):
        shown = "/".join(map(str, path))[:60]
        for name, token in TOKENS.items():
            yield f"{shown} = {name}", lambda value, path=path, token=token: replaced(value, path, token)
        yield f"{shown} removed", lambda value, path=path: replaced(value, path, None)
        if isinstance(path[-1], str):
            yield f"{shown} doubled", lambda value, path=path: doubled(value, path)
            yield f"{shown} renamed", lambda value, path=path: renamed(value, path)


def _holder(value: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    made = json.loads(json.dumps(value))
    at = made
    for key in path[:-1]:
        at = at[key]
    return made, at


def replaced(value: Any, path: tuple[Any, ...], token: str | None) -> str:
    """The document as text with one value in another's place; None removes it."""
    made, at = _holder(value, path)
    if token is None:
        del at[path[-1]]
    else:
        at[path[-1]] = HOLE
    return json.dumps(made).replace(json.dumps(HOLE), token or "")


def doubled(value: Any, path: tuple[Any, ...]) -> str:
    made, at = _holder(value, path)
    old = json.dumps(at[path[-1]])
    at[path[-1]] = HOLE
    again = f"{old}, {json.dumps(path[-1])}: 0"
    return json.dumps(made).replace(json.dumps(HOLE), again)


def renamed(value: Any, path: tuple[Any, ...]) -> str:
    made, at = _holder(value, path)
    at[EVIL] = at.pop(path[-1])
    return json.dumps(made)


def json_mutations(path: Path) -> list[Mutation]:
    """Every field of a JSON file, replaced by everything else."""
    try:
        document = json.loads(path.read_bytes())
    except ValueError:
        return []
    return [
        Mutation(f"field: {label}", lambda target, make=make, document=document: _put_text(target, make(document)))
        for label, make in field_mutations(document)
    ]


def _put_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def tensor_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def put_header(path: Path, header: str, data: bytes) -> None:
    raw = header.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def header_mutations(path: Path) -> list[Mutation]:
    """Every field of a safetensors header, and every field of a JSON document inside its metadata."""
    header, data = tensor_file(path)
    found = [
        Mutation(f"header: {label}", lambda target, make=make: put_header(target, make(header), data))
        for label, make in field_mutations(header)
    ]
    for key, text in header.get("__metadata__", {}).items():
        if not re.match(r"\s*[{\[]", text):
            continue
        for label, make in field_mutations(json.loads(text)):

            def apply(target: Path, make: Any = make, key: str = key, text: str = text) -> None:
                inside = {**header, "__metadata__": {**header["__metadata__"], key: make(json.loads(text))}}
                put_header(target, json.dumps(inside), data)

            found.append(Mutation(f"metadata: {label}", apply))
    return found


def number_mutations(path: Path) -> list[Mutation]:
    """The numbers of a safetensors file: NaN, infinite, huge, zero."""
    header, data = tensor_file(path)
    patterns = {"NaN": b"\xff\xff", "infinite": b"\x80\x7f", "huge": b"\x7f\x7f", "zero": b"\0\0"}
    text = json.dumps(header)
    return [
        Mutation(
            f"numbers: all {name}",
            lambda target, two=two: put_header(target, text, two * (len(data) // 2) + data[len(data) // 2 * 2 :]),
        )
        for name, two in patterns.items()
    ] + [
        Mutation(f"numbers: the first {name}", lambda target, two=two: put_header(target, text, two * 2 + data[4:]))
        for name, two in patterns.items()
    ]


def mutations_of(path: Path, rng: random.Random, n_bytes: int) -> list[Mutation]:
    """All ways in which this file is made wrong."""
    found = [*place_mutations(), *byte_mutations(rng, n_bytes)]
    if path.suffix == ".safetensors":
        return [*found, *header_mutations(path), *number_mutations(path)]
    return [*found, *json_mutations(path)] if path.suffix == ".json" else found
