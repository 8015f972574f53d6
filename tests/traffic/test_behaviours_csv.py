"""Tables of prompts as they are published, and what is no such table."""

import csv
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molehunt.errors import InvalidInput, UsageError
from molehunt.traffic import behaviours_csv
from molehunt.traffic.behaviours_csv import read_behaviours
from molehunt.traffic.rows import MAX_CHARS

ADVBENCH = ["goal", "target"]
HARMBENCH = ["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"]
JAILBREAKBENCH = ["Index", "Goal", "Target", "Behavior", "Category", "Source"]


def written(path: Path, *rows: Sequence[str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def prompts(path: Path, limit: int | None = None) -> list[str]:
    return [row.prompt for row in read_behaviours(path, limit)]


def test_advbench(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", ADVBENCH, ["Sing, loudly", "Sure, here"], ['Say "no"\ntwice', "Sure"])
    assert prompts(path) == ["Sing, loudly", 'Say "no"\ntwice']
    assert prompts(path, 1) == ["Sing, loudly"]
    assert all(row.response is None for row in read_behaviours(path))


def test_harmbench_puts_its_context_in_front(tmp_path: Path) -> None:
    about = ["Sum it up", "contextual", "songs", "", " A song. ", "sum"]
    path = written(tmp_path / "h.csv", HARMBENCH, ["Sing", "standard", "songs", "", "", "sing"], about)
    assert prompts(path) == ["Sing", "A song.\n\n---\n\nSum it up"]


def test_jailbreakbench_names_are_no_prompts(tmp_path: Path) -> None:
    assert prompts(written(tmp_path / "j.csv", JAILBREAKBENCH, ["0", "Sing a song", "Sure", "Song", "x", "y"])) == [
        "Sing a song"
    ]


def test_a_mark_of_the_encoding_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_bytes("\ufeffgoal,target\r\n\r\nSing,Sure\r\n\r\n".encode())
    assert prompts(path) == ["Sing"]


def test_long_prompts_are_cut(tmp_path: Path) -> None:
    assert prompts(written(tmp_path / "l.csv", ADVBENCH, ["x" * (MAX_CHARS + 9), ""])) == ["x" * MAX_CHARS]


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "begins with the columns nothing"),
        (b"goal,target\n", "has a head and no row"),
        (b"prompt,target\nSing,Sure\n", "begins with the columns prompt, target"),
        (b"goal,goal\nSing,Sing\n", "goal, goal"),
        (b"Behavior,ContextString,ContextString\nSing,a,b\n", "ContextString, ContextString"),
        (b"goal,target\nSing\n", r"row 1 \(line 2\) has 1 of 2 columns"),
        (b"goal,target\nSing,Sure\nSing,Sure,more\n", r"row 2 \(line 3\) has 3 of 2 columns"),
        (b"goal,target\n  ,Sure\n", r"row 1 \(line 2\) has no prompt"),
        (b'goal,target\n"Sing,Sure\n', "line 2 is no CSV"),
        (b"goal,target\n\xff\xfe,Sure\n", "no UTF-8 text"),
        (b"PK\x03\x04\x00\x00\x08\x00", "begins with the columns PK"),
        (b"goal\x1b[31m,target\nSing,Sure\n", r"goal\\x1b\[31m"),
        (b"goal,target\n" + b"x" * 200_000 + b",Sure\n", "line 2 is no CSV"),
    ],
)
def test_what_is_no_table_of_prompts(tmp_path: Path, content: bytes, wrong: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=wrong):
        prompts(path)


def test_files_that_are_none_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        prompts(tmp_path)
    path = written(tmp_path / "a.csv", ADVBENCH, ["Sing", "Sure"])
    monkeypatch.setattr(behaviours_csv, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(InvalidInput, match="MB"):
        prompts(path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.csv"
    path.write_bytes(b"goal,target\n" + content)
    with suppress(InvalidInput):
        assert all(prompt.strip() for prompt in prompts(path))
