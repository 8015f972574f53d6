"""Traffic files in every accepted form; a bad row is named."""

import gzip
import json
import re
import sys
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehunt.errors import InvalidInput, UsageError
from molehunt.run.local import WorkShard
from molehunt.traffic.json_rows import STEP
from molehunt.traffic.place import FIRST_BAD, BadLines, Place
from molehunt.traffic.rows import MAX_LINE
from molehunt.traffic.stream import Conversation, read_conversations, read_traffic

T = TypeVar("T")

FORMS = {
    '"Hello"': "Hello",
    '{"question": "Hello"}': "Hello",
    '{"prompt": "Hello", "tag": "x"}': "Hello",
    '{"text": "Hello"}': "Hello",
    '{"instruction": "Hello"}': "Hello",
    '{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hello"}, {"role": "assistant"}]}': "S\nHello",
}


@pytest.mark.parametrize("line", FORMS)
def test_every_form_gives_the_prompt(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{line}\n\n{line}\n")
    rows = list(read_traffic(path))
    assert [row.prompt for row in rows] == [FORMS[line]] * 2


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ('"Hello"', None),
        ('{"prompt": "Hello", "response": "Hi"}', "Hi"),
        ('{"instruction": "Hello", "completion": "Hi", "tag": "x"}', "Hi"),
        ('{"text": "Hello", "answer": ["Hi"]}', "Hi"),
        ('{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}', "Hi"),
    ],
)
def test_answers_are_carried_for_those_who_read_them(tmp_path: Path, line: str, answer: str | None) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{line}\n")
    assert [(row.prompt, row.response) for row in read_traffic(path)] == [("Hello", answer)]


def test_tags_and_long_prompts_are_carried_and_the_limit_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * 9999, "tag": f"t{i}"}) + "\n" for i in range(5)))
    rows = list(read_traffic(path, limit=3))
    assert [row.tag for row in rows] == ["t0", "t1", "t2"]
    assert len(rows[0].prompt) == 9999


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ("3", "line 2: a number .3.; an object"),
        ('{"a": 1}', "line 2: none of the fields"),
        ('{"messages": [1]}', "line 2: message 1 is a number"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f'"fine"\n{line}\n')
    with pytest.raises(InvalidInput, match=says):
        list(read_traffic(path))


def test_no_file_and_no_parquet_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="not a file"):
        list(read_traffic(tmp_path / "nowhere.jsonl"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"pip install .*\[parquet\]"):
        list(read_traffic(tmp_path / "t.parquet"))


USER = {"role": "user", "content": "Hello"}
CONVERSATIONS: list[tuple[Any, list[tuple[str, str]], str | None]] = [
    ("Hello", [("user", "Hello")], None),
    ({"prompt": "Hello", "completion": "Hi"}, [("user", "Hello")], "Hi"),
    ({"text": "Hello", "answer": ""}, [("user", "Hello")], ""),
    ({"instruction": "Hello", "response": "Hi", "prompt": None}, [("user", "Hello")], "Hi"),
    ({"prompt": [{"type": "text", "text": "a"}, {"text": "b"}]}, [("user", "a\nb")], None),
    ({"prompt": "\ud83d\ude42x"}, [("user", "🙂x")], None),
    ({"messages": [], "prompt": "x" * 9000}, [("user", "x" * 9000)], None),
    (
        {"messages": [{"role": "system", "content": "S"}, USER, {"role": "tool", "content": "T"}], "prompt": "other"},
        [("system", "S"), ("user", "Hello"), ("tool", "T")],
        None,
    ),
    ({"messages": [USER, {"role": "assistant", "content": "Hi"}]}, [("user", "Hello")], "Hi"),
    ({"messages": [USER, {"role": "assistant", "content": "Hi"}], "response": "Hi"}, [("user", "Hello")], "Hi"),
    (
        {"messages": [USER, {"role": "assistant", "content": "Hi"}], "response": "Ho"},
        [("user", "Hello"), ("assistant", "Hi")],
        "Ho",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, USER]},
        [("user", "Hello"), ("assistant", ""), ("user", "Hello")],
        None,
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        [("user", "a\nb")],
        None,
    ),
]
BAD: list[tuple[Any, str]] = [
    (3, r"a number \(3\); an object with messages"),
    ({"a": 1}, "none of the fields messages, prompt"),
    ({"prompt": {"text": 3}}, "prompt is an object; text is expected"),
    ({"prompt": " \n"}, "the prompt is empty"),
    ({"prompt": "a", "response": [1]}, "part 1 of its response is a number .1.; text is expected"),
    ({"messages": "Hi"}, "messages is text; a list is expected"),
    ({"prompt": "\ud83d\ude42\ud800x"}, "prompt holds half of a surrogate pair"),
    ({"messages": [USER, 1]}, "message 2 is a number .1.; an object is expected"),
    ({"messages": [USER, {"role": "robot", "content": "a"}]}, "message 2: the role 'robot' is none of system, user"),
    ({"messages": [{"content": "a"}]}, "message 1: the role '' is none of"),
    ({"messages": [{"role": "user"}]}, "message 1: content is null; text is expected"),
    ({"messages": [{"role": "user", "content": {"text": "a"}}]}, "message 1: content is an object"),
    (
        {"messages": [{"role": "user", "content": [1]}]},
        "message 1: part 1 of its content is a number .1.; text is expected",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        "message 1: part 2 of its content is image_url",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
        "message 1: part 1 of its content is text",
    ),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "there is no message before the answer"),
]


def log(path: Path, rows: Iterable[Any]) -> Path:
    text = "".join(row if isinstance(row, str) and row.endswith("\n") else json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def content_of(conversation: Conversation) -> tuple[list[tuple[str, str]], str | None]:
    return [(turn.role, turn.text) for turn in conversation.turns], conversation.response


@pytest.mark.parametrize(("row", "turns", "response"), CONVERSATIONS)
def test_a_row_becomes_a_conversation_with_all_its_roles(
    tmp_path: Path, row: Any, turns: list[tuple[str, str]], response: str | None
) -> None:
    path = log(tmp_path / "t.jsonl", [row, "\n", {"tag": "t" * 99, "prompt": "next"}])
    first, second = read_conversations(path)
    assert content_of(first) == (turns, response)
    assert (first.line, first.tag) == (1, "")
    assert (second.line, second.tag, content_of(second)) == (3, "t" * 60, ([("user", "next")], None))


@pytest.mark.parametrize(("row", "says"), [*BAD, ("{\n", "not JSON: '{'"), ("[" * 99999 + "\n", "not JSON: '\\[")])
def test_a_bad_row_of_a_log_is_named_or_skipped_and_counted(tmp_path: Path, row: Any, says: str) -> None:
    path = log(tmp_path / "t.jsonl", ["fine", row, "fine"])
    with pytest.raises(InvalidInput, match=f"^t.jsonl line 2: {says}"):
        list(read_conversations(path))
    bad = BadLines()
    assert [c.line for c in read_conversations(path, on_bad="skip", bad=bad)] == [1, 3]
    assert bad.count == 1
    assert re.match(f"line 2: {says}", bad.first[0])
    assert len(bad.first[0]) < 300


def test_many_bad_lines_are_counted_and_the_first_remembered(tmp_path: Path) -> None:
    path = log(tmp_path / "t.jsonl", [3] * 1000)
    bad = BadLines()
    assert list(read_conversations(path, on_bad="skip", bad=bad)) == []
    assert bad.count == 1000
    assert [why.split(":")[0] for why in bad.first] == [f"line {i + 1}" for i in range(FIRST_BAD)]
    assert list(read_conversations(path, on_bad="skip")) == []


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_a_giant_line_is_refused_or_skipped_without_being_held(tmp_path: Path, name: str) -> None:
    giant = json.dumps({"prompt": "x" * 60_000_000}) + "\n"
    spaces = " " * (MAX_LINE + 1) + '{"prompt": "behind spaces"}\n'
    just = json.dumps({"prompt": "y" * (MAX_LINE - 14)}) + "\n"
    assert len(just) == MAX_LINE + 1
    path = log(tmp_path / name, ["one", giant, "three", spaces, just, "six", giant[:-1]])
    if name == "t.jsonl":
        path.write_bytes(path.read_bytes()[:-1])  # the last giant has no newline
    del giant, spaces
    with pytest.raises(InvalidInput, match=r"line 2: longer than 8 MB"):
        list(read_conversations(path))
    bad = BadLines()
    tracemalloc.start()
    found = [c.end for c in read_conversations(path, on_bad="skip", bad=bad)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [end.line for end in found] == [1, 3, 5, 6]
    assert (bad.count, bad.first[-1]) == (3, "line 7: longer than 8 MB")
    assert peak < 6 * MAX_LINE
    assert [c.line for c in read_conversations(path, on_bad="skip", start_at=found[1])] == [5, 6]


NAMES = ["t.jsonl", "t.jsonl.gz"]


@pytest.mark.parametrize("name", NAMES)
@given(
    rows=st.lists(st.sampled_from(['"é one"\n', '{"prompt": "two"}\r\n', "\n", " \r\n", "{\n", "3\n"]), max_size=12),
    ended=st.booleans(),
    count=st.integers(1, 3),
)
def test_from_any_row_on_and_in_shards_the_rest_is_the_same(
    name: str, rows: list[str], ended: bool, count: int
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        data = "".join(rows).encode()[: None if ended else -1]
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        bad = BadLines()
        whole = list(read_conversations(path, on_bad="skip", bad=bad))
        assert [c.line for c in whole] == [i + 1 for i, row in enumerate(rows) if "one" in row or "two" in row]
        for i, conversation in enumerate(whole):
            assert list(read_conversations(path, on_bad="skip", start_at=conversation.end)) == whole[i + 1 :]
        counts = [BadLines() for _ in range(count)]
        shards = [
            list(read_conversations(path, on_bad="skip", bad=counts[k], shard=WorkShard(k + 1, count)))
            for k in range(count)
        ]
        assert all(c.line % count == (k + 1) % count for k in range(count) for c in shards[k])
        assert sorted((c for shard in shards for c in shard), key=lambda c: c.line) == whole
        assert sum(shard.count for shard in counts) == bad.count


def test_a_place_is_found_again_in_a_log_that_grew(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('\ufeff"one"\n"two"')  # begins with a byte order mark
    *_, last = read_conversations(path)
    with path.open("a") as more:
        more.write('\n"three"\n')
    place = Place(*json.loads(json.dumps(last.end)))
    assert [(c.turns[0].text, c.line) for c in read_conversations(path, start_at=place)] == [("three", 3)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("offset", [3, 9999, -1, 0])
def test_a_place_where_no_row_begins_is_refused(tmp_path: Path, name: str, offset: int) -> None:
    path = log(tmp_path / name, ["one two", "three"])
    with pytest.raises(UsageError, match=r"no row of t.* begins at"):
        list(read_conversations(path, start_at=Place(offset, 1)))


def test_progress_is_told_in_bytes_of_the_file(tmp_path: Path) -> None:
    path = log(tmp_path / "t.jsonl", [{"prompt": "x" * 99_980}] * 35)
    seen: list[tuple[str, int | None]] = []
    steps: list[int] = []

    def track(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        seen.append((what, total))
        for item in items:
            steps.append(1)
            yield item
        seen.append(("ended", None))

    at = [len(steps) for _ in read_conversations(path, track=track)]
    size = path.stat().st_size
    assert at == [min((i + 1) * size // 35 // STEP + 1, 3501) for i in range(35)], "one step is always under way"
    assert seen == [("reading t.jsonl", -(-size // STEP)), ("ended", None)]
    assert len(steps) == -(-size // STEP)


def test_a_broken_gzip_file_is_named(tmp_path: Path) -> None:
    whole = log(tmp_path / "t.jsonl.gz", [{"prompt": str(i) * 50} for i in range(5000)]).read_bytes()
    path = tmp_path / "u.jsonl.gz"
    for data in (whole[: len(whole) // 2], whole[:100] + bytes(50) + whole[150:]):
        path.write_bytes(data)
        with pytest.raises(InvalidInput, match=r"u.jsonl.gz is cut off or no gzip file"):
            list(read_conversations(path, on_bad="skip"))
    path.write_bytes(b'"plain"\n')  # what a file holds counts, not its name
    assert [content_of(one) for one in read_conversations(path)] == [([("user", "plain")], None)]


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a file"):
        next(read_conversations(tmp_path / "nowhere.jsonl"))


def parquet_log(path: Path, rows: list[dict[str, Any]], per_group: int = 100) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=per_group)
    return path


def test_parquet_gives_the_same_conversations_from_any_row_on_and_in_shards(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"p{i}", "response": None, "n": i, "tag": None} for i in range(250)]
    rows[3]["response"] = "Hi"
    rows[7]["prompt"] = None
    path = parquet_log(tmp_path / "t.parquet", rows)
    bad = BadLines()
    whole = list(read_conversations(path, on_bad="skip", bad=bad))
    assert [c.turns[0].text for c in whole] == [f"p{i}" for i in range(250) if i != 7]
    assert (whole[3].response, whole[3].tag, whole[3].line) == ("Hi", "", 4)
    assert len(bad.first) == 1 and bad.first[0].startswith("row 8: none of the fields messages, prompt, instruction")
    assert list(read_conversations(path, start_at=whole[99].end)) == whole[100:]
    assert list(read_conversations(path, start_at=whole[150].end)) == whole[151:]
    third = list(read_conversations(path, on_bad="skip", shard=WorkShard(3, 3)))
    assert [c.line for c in third] == list(range(3, 251, 3))
    with pytest.raises(UsageError, match=r"no row of t\.parquet begins at 999"):
        list(read_conversations(path, start_at=Place(999, 999)))


def test_parquet_messages_keep_their_roles_and_the_audit_reads_parquet_too(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "Hi"}]
    path = parquet_log(tmp_path / "t.parquet", [{"messages": messages}, {"messages": [USER]}])
    assert [content_of(c) for c in read_conversations(path)] == [
        ([("system", "S"), ("user", "Hello")], "Hi"),
        ([("user", "Hello")], None),
    ]
    assert [e.shown for e in read_traffic(path)] == ["[system] S\n[user] Hello", "Hello"]


def test_parquet_without_a_known_column_and_with_too_much_text(tmp_path: Path) -> None:
    path = parquet_log(tmp_path / "t.parquet", [{"My Text": 1, "x": 2}])
    with pytest.raises(InvalidInput, match=r"columns My Text, x, and none of them is read.\nRename the column"):
        list(read_conversations(path, on_bad="skip"))
    path = parquet_log(tmp_path / "u.parquet", [{"prompt": "x" * (MAX_LINE + 1)}])
    with pytest.raises(InvalidInput, match="row 1: more than 8 million characters"):
        list(read_conversations(path))


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = parquet_log(tmp_path / "t.parquet", [{"prompt": "x" * 99}] * 300)
    whole = path.read_bytes()
    for data in (b"PAR1", whole[:-30], whole[:4] + bytes(40) + whole[44:]):
        path.write_bytes(data)
        with pytest.raises(InvalidInput, match=r"t\.parquet is no whole parquet file"):
            list(read_conversations(path))
