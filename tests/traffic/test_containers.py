"""Files of traffic: what they hold is read, whatever holds it and however it is packed, encoded and named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molehunt.errors import InvalidInput, UsageError
from molehunt.traffic.place import BadLines, Place
from molehunt.traffic.stream import read_conversations, read_traffic

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).map(lambda text: f"a{text}")
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT}),
    max_size=3,
).map(lambda some: [*some, {"role": "user", "content": "Why?"}])
ROWS = st.lists(st.fixed_dictionaries({"messages": MESSAGES, "response": st.none() | TEXT}), min_size=1, max_size=4)


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    out = io.StringIO(newline="")
    table = csv.writer(out, delimiter=delimiter)
    table.writerow(["id", "messages", "response"])
    table.writerows([i, json.dumps(row["messages"]), row["response"]] for i, row in enumerate(rows))
    return out.getvalue()


CONTAINERS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "lines": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    "lines, escaped, no last newline": lambda rows: "\r\n\r\n".join(map(json.dumps, rows)),
    "array": json.dumps,
    "array over lines": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False) + "\n",
    "objects over lines": lambda rows: "\n".join(json.dumps(row, indent=4) for row in rows),
    "wrapped": lambda rows: json.dumps({"version": "1.0", "data": rows}),
    "wrapped over lines": lambda rows: json.dumps({"train": rows, "n": len(rows)}, indent=1),
    "csv": as_csv,
    "tsv": lambda rows: as_csv(rows, "\t"),
    "semicolons": lambda rows: as_csv(rows, ";"),
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress,
}  # fmt: skip


def read(path: Path) -> list[tuple[list[dict[str, str]], str | None]]:
    return [
        ([{"role": turn.role, "content": turn.text} for turn in one.turns], one.response)
        for one in read_conversations(path)
    ]


@settings(max_examples=60, deadline=None)
@given(
    rows=ROWS,
    container=st.sampled_from(list(CONTAINERS)),
    encoding=st.sampled_from(ENCODINGS),
    packing=st.sampled_from(list(PACKINGS)),
    name=st.sampled_from(["rows", "rows.jsonl", "rows.json", "rows.txt.gz", "rows.data"]),
)
def test_any_conversations_come_back_from_any_container(
    rows: list[dict[str, Any]], container: str, encoding: str, packing: str, name: str
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(PACKINGS[packing](CONTAINERS[container](rows).encode(encoding)))
        assert read(path) == [(row["messages"], row["response"]) for row in rows]


@settings(max_examples=15, deadline=None)
@given(rows=ROWS, container=st.sampled_from(list(CONTAINERS)), several=st.booleans())
def test_zstd_is_read_with_its_extra(rows: list[dict[str, Any]], container: str, several: bool) -> None:
    zstandard = pytest.importorskip("zstandard")
    data = CONTAINERS[container](rows).encode()
    parts = [data[: len(data) // 2], data[len(data) // 2 :]] if several else [data]
    with TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl.zst")
        path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in parts))
        assert read(path) == [(row["messages"], row["response"]) for row in rows]
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(InvalidInput, match=r"rows\.jsonl\.zst is cut off or no zstd file"):
            read(path)


def test_zstd_without_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "rows.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04\x00\x01\x00\x00")
    with pytest.raises(UsageError, match=r"pip install .*\[zst\]"):
        read(tmp_path / "rows.zst")


@pytest.mark.parametrize("packed", [False, True])
def test_a_fifo_is_read_while_it_is_written(tmp_path: Path, packed: bool) -> None:
    path, seen = tmp_path / "log", threading.Event()
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as out:
            if packed:
                out.write(gzip.compress(b'{"prompt": "first"}\n{"prompt": "second"}\n'))
                return
            out.write(b'{"prompt": "first"}\n')
            assert seen.wait(20), "the second row is only written once the first was read"
            out.write(b'{"prompt": "second"}\n')

    writer = threading.Thread(target=write)
    writer.start()
    found: list[str] = []
    for one in read_traffic(path):
        found.append(one.prompt)
        seen.set()
    writer.join()
    assert found == ["first", "second"]


@pytest.mark.parametrize("container", ["lines", "array", "csv", "wrapped over lines", "objects over lines"])
def test_reading_goes_on_from_any_row_of_any_container(tmp_path: Path, container: str) -> None:
    rows = [{"messages": [{"role": "user", "content": f"row {i}"}], "response": None} for i in range(9)]
    for encoding in ("utf-8", "utf-16"):
        path = tmp_path / f"rows.{encoding}"
        path.write_bytes(CONTAINERS[container](rows).encode(encoding))
        whole = list(read_conversations(path))
        for i, one in enumerate(whole):
            assert list(read_conversations(path, start_at=one.end)) == whole[i + 1 :]
        with pytest.raises(UsageError, match="no row of"):
            list(read_conversations(path, start_at=Place(9999, 9999)))


def test_tables_of_prompts_as_they_are_published(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('goal,target\n"Sing, loudly","Sure, here"\n"Say ""no""\ntwice",Sure\n')
    assert [one.prompt for one in read_traffic(path)] == ["Sing, loudly", 'Say "no"\ntwice']
    path.write_text("Index,Goal,Target,Behavior\n0,Sing a song,Sure,Song\n")
    assert [one.prompt for one in read_traffic(path)] == ["Sing a song"]
    path.write_text('Behavior,ContextString\nSing,\nSum it up," A song. "\n')
    assert [one.prompt for one in read_traffic(path)] == ["Sing", "A song.\n\n---\n\nSum it up"]


def test_bad_rows_of_a_table_are_named_and_the_others_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b'prompt,tag\none,a\ntwo\nthree,c,d\n ,e\nf\xffve,f\nsix,g\n"seven,h\neight,i\n')
    bad = BadLines()
    assert [one.prompt for one in read_traffic(path, on_bad="skip", bad=bad)] == ["one", "six"]
    assert bad.first == [
        "row 2: it has 1 of 2 columns (line 3): cut off, or edited",
        "row 3: it has 3 of 2 columns (line 4): cut off, or edited",
        "row 4: none of the fields messages, prompt, instruction, question, query, goal, behavior, inputs, input, text",
        "row 5: prompt holds half of a surrogate pair, or a byte that is no UTF-8",
        "row 7: lines 8 to 9 are no CSV: unexpected end of data",
    ]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'[{"prompt": "a"}, {"prompt": "b"', "item 2 is not JSON, or cut off"),
        (b'[{"prompt": "a"} {"prompt": "b"}]', "broken behind item 1"),
        (b'[\n{"prompt": "a"},\n{"prompt": }\n]', "item 2 is not JSON"),
        (b'[\n{"prompt": "a"}\n]\n{"prompt": "b"}', "goes on behind its array of 1 items"),
        (b'{"train": ["a"], "test": ["b"]}', r"several lists of rows \(train, test\)"),
        (b'{\n"train": ["a"],\n"test": ["b"]\n}', r"several lists of rows \(train, test\)"),
        (b"PK\x03\x04\x00\x00", "is a zip archive: unpack it"),
        (b"SQLite format 3\x00", "is a database"),
        ('{"prompt": "a"}\n'.encode("utf-16") + b"\x00", "begins as UTF-16-LE text and does not go on as such"),
        (b"\x1f\x8b\x08\x00", "cut off or no gzip file"),
        (b"BZh91AY", "cut off or no bzip2 file"),
        (
            b"sentence,label\nHi,1\n",
            r"line 1: not JSON: 'sentence,label'(.|\n)*This is plain text\. Put each prompt in one line of JSON",
        ),
    ],
)
def test_a_file_that_is_broken_is_named_with_the_reason(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "rows.data"
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match=says):
        read(path)


def test_a_table_without_a_column_that_is_read_says_which_ones_are(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for text, says in (
        (
            "a\x1b,User B\n1,2\n",
            r"columns a\\x1b, User B, and none of them is read.\nRename the column with the prompts to `prompt`; if ",
        ),
        ("prompt,Prompt\nx,y\n", "the column prompt twice"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidInput, match=says):
            read(path)


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=60), st.sampled_from([b"", b"[", b'{"data": [', b"prompt,tag\n", b"\xff\xfe", b"\x1f\x8b\x08"])
)
def test_any_bytes_are_read_or_refused(data: bytes, begins: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "any")
        path.write_bytes(begins + data)
        bad = BadLines()
        try:
            for one in read_conversations(path, on_bad="skip", bad=bad):
                assert all(isinstance(turn.text, str) for turn in one.turns)
        except InvalidInput as error:
            assert str(error).isprintable() or "\n" in str(error)
