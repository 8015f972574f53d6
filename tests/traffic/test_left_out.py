"""What is said about the rows of a file: which were read, as what, and which could not be read."""

import json
from pathlib import Path
from typing import Any

import pytest

from molehunt.errors import InvalidInput
from molehunt.traffic.left_out import ReadRows, RowCount, askable
from molehunt.traffic.place import FIRST_BAD, RANGES, BadLines
from molehunt.traffic.rows import form_of
from molehunt.traffic.stream import read_conversations
from molehunt.workflows.inputs import read_rows

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
REQUEST = {"request": {"messages": [USER]}, "response": {"choices": [{"message": ASSISTANT}]}}


def log(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        ([REQUEST] * 3, "Read 3 of 3 rows of t.jsonl, as logged requests; logged answers are not used."),
        ([{"prompt": "Hi"}], "Read 1 of 1 row of t.jsonl, from the field prompt."),
        (
            [{"messages": [USER], "tools": [TOOL]}, {"messages": [USER], "tools": []}],
            "Read 2 of 2 rows of t.jsonl, 1 as conversations in the field messages, 1 as conversations in the field "
            "messages without their tools.",
        ),
        (
            [{"body": {"messages": [USER], "functions": [TOOL], "documents": [{"text": "a"}]}}],
            "Read 1 of 1 row of t.jsonl, as logged requests without their functions and documents.",
        ),
        ([{"instruction": "Do", "input": "it"}] * 2, "Read 2 of 2 rows of t.jsonl, from the fields instruction and input."),
        (
            [{"messages": [USER]}, {"messages": [USER, ASSISTANT]}, {"text": "Hi"}],
            "Read 3 of 3 rows of t.jsonl, 2 as conversations in the field messages, 1 from the field text; the 1 logged "
            "answer is not used.",
        ),
        (
            [{"prompt": "Hi", "response": "Ho"}, {"prompt": 5}, {"prompt": "Hi"}],
            "Read 2 of 3 rows of t.jsonl, from the field prompt; 1 could not be read: line 2: prompt is a number (5); text "
            "is expected. The 1 logged answer is not used.",
        ),
    ],
)  # fmt: skip
def test_what_was_read_is_said_in_one_line(tmp_path: Path, rows: list[Any], note: str) -> None:
    assert read_rows(log(tmp_path / "t.jsonl", rows)).note == note


def test_a_limit_is_said_and_a_list_has_no_name() -> None:
    assert read_rows(["Hi", "Ho", "Hu"], 2).note == "Read 2 of the first 2 rows of the list, as texts."
    assert read_rows([[USER], [{"x": 1}], [USER]]).note.startswith(
        "Read 2 of 3 rows of the list, as lists of messages; 1 could"
    )
    assert ReadRows(()).note == RowCount().sentence("judged") == ""


@pytest.mark.parametrize(
    ("bad", "more"),
    [
        (FIRST_BAD, ""),
        (FIRST_BAD + 1, "and 1 more row: line 7"),
        (FIRST_BAD + 41, "and 41 more rows: lines 7–47"),
    ],
)
def test_bad_rows_behind_the_first_ones_are_named_by_number(tmp_path: Path, bad: int, more: str) -> None:
    path = log(tmp_path / "t.jsonl", ['"fine"', *["{"] * bad, *['"fine"'] * bad])
    found = read_rows(path)
    assert found.bad.more == more and found.note.endswith(f"line 6: not JSON: '{{'{'; ' if more else ''}{more}.")


def test_many_gaps_between_bad_rows_are_cut_and_one_that_is_open_is_not() -> None:
    bad = BadLines()
    for line in [1, 2, 3, 4, 5, 30, *range(60, 101), 103]:
        bad.add(line, "not JSON")
    assert bad.more == "and 43 more rows: lines 30, 60–100, 103"
    for line in range(200, 200 + 4 * RANGES, 2):
        bad.add(line, "not JSON")
    assert bad.more.endswith("208, …") and len(bad.later) == RANGES
    assert bad.places == f"line 1; line 2; line 3; line 4; line 5; {bad.more}", "no word of the rows"


def test_rows_that_a_template_refuses_are_named_by_their_lines(tmp_path: Path) -> None:
    chat = {"messages": [USER, ASSISTANT, USER]}
    read = read_rows(log(tmp_path / "t.jsonl", ["{", "", {"prompt": "Hi"}, chat, chat, chat]))

    def refuse(row: object) -> None:
        raise InvalidInput("no")

    assert [row.line for row in read.rows] == [3, 4, 5, 6]
    found = askable(read, refuse)
    assert found.bad.first == ["line 1: not JSON: '{'", "line 4: no", "line 5: no", "line 6: no"]
    assert read.bad.count == 1, "what was read stays as it is"


def test_lines_of_plain_text_come_with_the_one_change_that_they_need(tmp_path: Path) -> None:
    advice = r'This is plain text\. Put each prompt in one line of JSON: \{"prompt": '
    for rows in (["What colour is snow?", "Sing."], ["42 is what?", "Sing."]):
        path = log(tmp_path / "t.txt", rows)
        with pytest.raises(InvalidInput, match=advice):
            read_rows(path)
        with pytest.raises(InvalidInput, match=advice):
            list(read_conversations(path))
    with pytest.raises(InvalidInput) as broken:
        read_rows(log(tmp_path / "t.jsonl", ['{"prompt": "a']))
    assert "plain text" not in str(broken.value) and "A row is a string" in str(broken.value)


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ("Hi", "as texts"),
        ([USER], "as lists of messages"),
        ({"body": {"prompt": "Hi"}}, "as logged requests"),
        ({"row": {"prompt": "Hi"}}, "from the object row"),
        ({"messages": [], "Goal": "Hi"}, "from the field goal"),
        ({"messages": [USER], "body": {}}, "as conversations in the field messages"),
        ({"chosen": [USER, ASSISTANT], "prompt": "Hi"}, "from the field chosen"),
    ],
)
def test_the_form_is_the_one_that_was_read(row: Any, form: str) -> None:
    assert form_of(row) == form


def test_the_columns_of_a_table_are_named_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("User Message,Label\nHi,1\n")
    with pytest.raises(
        InvalidInput, match=r"the columns User Message, Label, and(.|\n)*if the file has no header line, add"
    ):
        read_rows(path)
