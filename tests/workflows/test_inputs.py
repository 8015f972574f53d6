"""What a verb takes as texts: a file, or a list that is read as the file with the same rows would be."""

import json
from pathlib import Path
from typing import Any

import pytest

from molehunt.errors import InvalidInput, UsageError
from molehunt.workflows.inputs import conversations, examples, prompts

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
    assert prompts(ROWS) == prompts(file) == ["What is 2 plus 2?", "Sing", "And now?"]
    read, listed = conversations(file), conversations(ROWS)
    assert [(one.turns, one.response, one.tag, one.line) for one in read] == [
        (one.turns, one.response, one.tag, one.line) for one in listed
    ]
    assert [one.response for one in listed] == [None, "La", "Bye"]


def test_a_bare_list_of_messages_is_a_conversation() -> None:
    assert prompts([CHAT]) == prompts([{"messages": CHAT}]) == ["And now?"]
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
    with pytest.raises(UsageError, match=r"is not a file\. Give a JSONL or parquet file, or a list of texts"):
        read("What is 2 plus 2?")


@pytest.mark.parametrize("read", [examples, conversations])
def test_a_bad_row_of_a_list_is_named_by_its_number(read: Any) -> None:
    with pytest.raises(InvalidInput, match="row 2"):
        read(["Hi", {"nothing": 1}])
