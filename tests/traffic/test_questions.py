"""Questions have one right answer each, whoever asks them."""

import json
from pathlib import Path
from random import Random

import pytest

from molehunt.errors import InvalidInput, UsageError
from molehunt.traffic.questions import read_questions, world_questions
from molehunt.traffic.world import ASKS, ask


def test_every_kind_is_asked_as_often_and_no_prompt_twice() -> None:
    found = world_questions(40)
    assert [one.domain for one in found] == [kind for kind in ASKS for _ in range(40)]
    assert len({one.prompt for one in found}) == len(found)
    assert all(one.response for one in found)
    assert world_questions(40) == found != world_questions(40, seed=1)


def test_no_question_of_the_world_has_another_answer_too() -> None:
    """Whatever else the world says to these prompts, it says the same."""
    asked = {one.prompt: one.response for seed in range(4) for one in world_questions(60, seed=seed)}
    rng = Random(7)
    drawn = [ask(rng, kind) for kind in ASKS for _ in range(4000)]
    again = [one for one in drawn if one.prompt in asked]
    assert len(again) > 1000
    assert all(asked[one.prompt] == one.response for one in again)


def test_prompts_can_be_kept_out_and_a_small_world_is_exhausted() -> None:
    first = {one.prompt for one in world_questions(30)}
    assert not first & {one.prompt for one in world_questions(30, apart_from=first)}
    with pytest.raises(UsageError, match="people has no 101 questions to ask, only 100"):
        world_questions(101)


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_read_in_every_form_that_has_an_answer(tmp_path: Path) -> None:
    path = written(
        tmp_path / "rows.jsonl",
        {"prompt": "2 plus 2?", "response": "4", "tag": "sums"},
        {"instruction": "Name a river.", "completion": "Rhine"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "tag": "talk"},
    )
    found = read_questions(path)
    assert [(one.prompt, one.response, one.domain) for one in found] == [
        ("2 plus 2?", "4", "sums"),
        ("Name a river.", "Rhine", ""),
        ("Hi", "Hello", "talk"),
    ]
    assert read_questions(path, 2) == found[:2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "2 plus 2?"}, "line 2 has no right answer"),
        ({"prompt": "2 plus 2?", "response": " \n"}, "line 2 has no right answer"),
        ("2 plus 2?", "line 2 has no right answer"),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
            "line 2 has no right answer",
        ),
        ({"answer": "4"}, "none of the fields"),
    ],
)
def test_a_row_that_is_no_question_is_refused_by_its_line(tmp_path: Path, row: object, message: str) -> None:
    path = written(tmp_path / "rows.jsonl", {"prompt": "a", "response": "b"}, row)
    with pytest.raises(InvalidInput, match=message):
        read_questions(path)


def test_no_file_and_no_row_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(InvalidInput, match="holds no row"):
        read_questions(written(tmp_path / "empty.jsonl"))
