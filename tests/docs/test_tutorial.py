"""The tutorial has six tasks of one import and at most five lines each. `test_doc_blocks.py` runs them."""

import ast

import pytest
from tqdm import tqdm

from doc_blocks import Block
from molehunt.run.progress import Track, counting
from tutorial_checks import CHECKS, TUTORIAL

LINES = 5
TASKS = TUTORIAL[1:]


def test_there_are_six_tasks_and_a_check_of_each() -> None:
    assert len(TASKS) == 6 and len(CHECKS) == len(TUTORIAL)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_task_is_one_import_and_five_lines(task: Block) -> None:
    body = ast.parse(task.text).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports] == ["import molehunt as mh"]
    lines = [line for line in task.text.splitlines() if line.strip() and line != "import molehunt as mh"]
    assert len(lines) <= LINES and len(lines) == len(body) - 1, "each line is one statement"


def test_tqdm_is_a_track_as_the_tutorial_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(tqdm, Track)
    with counting(tqdm, "reading rows", 3) as done:
        done(3)
    assert "reading rows: 100%" in capsys.readouterr().err
