"""The options of `molehunt stress`: the workflow knows each, with the same default, and old names lead to new ones."""

import inspect
from pathlib import Path

import pytest

from molehunt.cli.main import main
from molehunt.cli.stress import stress as command
from molehunt.stress.evaluation.config import StressConfig
from molehunt.workflows.stress import stress as workflow


def test_the_workflow_takes_every_option_with_its_default() -> None:
    options, arguments = inspect.signature(command).parameters, inspect.signature(workflow).parameters
    for name, option in options.items():
        if name in ("as_json", "tuned"):
            continue
        if name in arguments:
            expected = Path("stress") if name == "out" else arguments[name].default
        else:
            expected = getattr(StressConfig(), name)
        assert option.default == expected, name


@pytest.mark.parametrize(("old", "new"), [("--shows", "--match"), ("--lacks", "--exclude"), ("--most", "--max-norm")])
def test_an_old_name_is_answered_by_the_new_one(old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["stress", "BASE", "TUNED", "--prompts", "p.jsonl", old, "8"])
    assert left.value.code == 2
    assert f"{old} is now called {new}." in capsys.readouterr().err
