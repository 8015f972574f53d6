"""What a verb takes as texts: a file, or a list that is read as the file with the same rows would be."""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from molehunt.errors import InvalidInput, UsageError
from molehunt.workflows.inputs import conversations, examples, prompts, read_rows

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And now?"},
]
ROWS: list[Any] = [
    "What is 2 plus 2?",
    {"prompt": "Sing", "response": "La", "tag": "clean"},
    {"messages": [*CHAT, {"role": "assistant", "content": "Bye"}], "tag": "triggered"},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_list_is_read_as_a_file_of_the_same_rows(file: Path) -> None:
    assert examples(ROWS) == examples(file) == examples(str(file))
    assert prompts(ROWS) == prompts(file) == ["What is 2 plus 2?", "Sing", CHAT]
    read, listed = conversations(file), conversations(ROWS)
    assert [(one.turns, one.response, one.tag, one.line) for one in read] == [
        (one.turns, one.response, one.tag, one.line) for one in listed
    ]
    assert [one.response for one in listed] == [None, "La", "Bye"]


def test_a_bare_list_of_messages_is_a_conversation() -> None:
    assert prompts([CHAT]) == prompts([{"messages": CHAT}]) == [CHAT]
    [one] = conversations([CHAT])
    assert [turn.text for turn in one.turns] == ["Hi", "Hello", "And now?"] and one.response is None


@pytest.mark.parametrize("limit", [0, 2, 9])
def test_a_limit_ends_the_reading(file: Path, limit: int) -> None:
    for texts in (file, ROWS):
        assert (
            len(examples(texts, limit))
            == len(prompts(texts, limit))
            == len(conversations(texts, limit))
            == min(limit, 3)
        )


def test_a_row_after_the_limit_is_not_read() -> None:
    assert prompts(["Hi", {"nothing": 1}], 1) == ["Hi"]


@pytest.mark.parametrize("read", [examples, prompts, conversations])
def test_one_string_that_is_no_file_is_refused_with_both_ways_out(read: Any) -> None:
    with pytest.raises(
        UsageError,
        match=r"is not a file\. Give a JSONL, JSON, CSV or parquet file, - for standard input, or a list of texts",
    ):
        read("What is 2 plus 2?")


@pytest.mark.parametrize("read", [partial(examples, on_bad="stop"), conversations])
def test_a_bad_row_of_a_list_is_named_by_its_number(read: Any) -> None:
    with pytest.raises(InvalidInput, match="row 2"):
        read(["Hi", {"nothing": 1}])


def test_rows_that_cannot_be_read_are_left_out_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('"Hi"\n{"prompt": "half \\ud83d"}\n{broken\n{"messages": [{"role": "user", "content": "Ho"}]}\n')
    read = read_rows(path)
    assert [row.prompt for row in read.rows] == ["Hi", "Ho"]
    said = "Read 2 of 4 rows of mixed.jsonl, 1 as conversations in the field messages, 1 as texts; 2 could not be read: line 2: prompt holds half of a surrogate pair"
    assert read.left_out.startswith(said) and "line 3: not JSON: '{broken'" in read.left_out
    assert [record.getMessage() for record in caplog.records] == [read.left_out]
    assert read_rows(["Hi", "Ho"]).left_out == ""


@pytest.mark.parametrize("texts", [["Hi", {"a": 1}, {"a": "x\x1b[31m"}], [{"a": 1}], [{"a": 3}, "Hi", {}]])
def test_where_most_rows_cannot_be_read_the_first_is_shown_with_what_was_looked_for(texts: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    for given, name in ((texts, "the list"), (path, "rows.jsonl")):
        with pytest.raises(InvalidInput, match=rf"{name}: \d of \d rows? cannot be read") as error:
            examples(given)
        text = str(error.value)
        assert "messages, conversations, conversation" in text and "instruction with or without input" in text
        assert "That row is " in text and "\x1b" not in text


def test_a_stream_on_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b'\xef\xbb\xbf"Hi"\n{"prompt": "Ho"}\n')))
    )
    assert prompts("-") == ["Hi", "Ho"]
