"""Every block of commands or Python in the documents runs as it is written, in a folder where its names are real.

Blocks run in the order of the documents and share the folder: a later one may use what an earlier one made.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import parsed
from doc_blocks import ROOT, Block, blocks, every_block
from documented_folder import AUDIT, PLAN, PRINTED, WRITTEN, documented_folder
from molehunt.audit.plan import PLANS
from molehunt.cli.main import main
from molehunt.serve import server
from tutorial_checks import CHECKS, TUTORIAL

KEY = "a-key-for-tests-only"
SHORT = ("--limit", "12", "--max-new-tokens", "8")
WATCHED = ("--fpr", "0.02", "--clean-rows", "300", "--max-new-tokens", "8")
SMALLER = {
    "watch": WATCHED,
    "watch --attacks": (*WATCHED, "--repeats", "10"),
    "watch --mode": WATCHED,
    "serve": (*WATCHED, "--clean", "known-clean.jsonl"),
    "steer try": SHORT,
    "steer sweep": SHORT,
    "steer capability": ("--limit", "24", "--each", "4"),
    "transfer fit": ("--confirm", "1"),
    "stress": ("--rows", "6", "--steps", "5", "--limit", "24", "--max-new-tokens", "8"),
    "harvest": ("--rows", "60"),
    "dictionary train": ("--steps", "10", "--batch", "256", "--expansion", "2"),
    "dictionary eval": ("--rows", "8", "--tokens", "2000"),
    "plant": ("--steps", "10"),
}
"""What is put behind a command so that it takes seconds; the last value of an option counts."""
ELSEWHERE = {
    "make": "it is what runs this test",
    "pip": "what it installs is the environment of this test",
    "molehunt bench": "minutes to hours: tests/bench/test_smoke_grid.py runs the smallest grid whole",
    "python -m experiments": "minutes to hours: tests/experiments/ runs the quick size of each",
}
"""Commands that do not run here, and why. `test_doc_names.py` checks their options, targets and files all the same."""
DOCUMENTED_URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return documented_folder(tmp_path_factory.mktemp("documented"))


@pytest.fixture(scope="module")
def running_server(folder: Path) -> Iterator[Callable[[], str]]:
    """Gives the URL of a server that goes on with the state of an earlier block."""
    started: list[subprocess.Popen[str]] = []

    def url() -> str:
        command = [sys.executable, "-m", "molehunt", "serve", "BASE", "TUNED", *SMALLER["serve"], "--port", "0"]
        process = subprocess.Popen([*command, "--json"], cwd=folder, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return json.loads(process.stdout.readline())["url"]

    yield url
    for process in started:
        process.kill()
        process.communicate()


def kind_of(words: list[str]) -> str:
    """`molehunt steer try …` → `steer try`, as the tables above name it."""
    if words[1] in ("steer", "transfer", "dictionary"):
        return " ".join(words[1:3])
    other = [option for option in ("--attacks", "--mode") if words[1] == "watch" and option in words]
    return " ".join([words[1], *other])


def runs_elsewhere(words: list[str]) -> bool:
    return any(" ".join(words).startswith(start) for start in ELSEWHERE)


def with_trained(words: list[str]) -> list[str]:
    """With a folder that `dictionary train` made for the NAME of the documents."""
    return [next(Path("dicts").glob("*k32*")).as_posix() if word == "dicts/NAME" else word for word in words]


def run(words: list[str]) -> None:
    assert words[0] == "molehunt", f"nothing runs {' '.join(words)}: mark the block, or say where it runs"
    kind = kind_of(words)
    arguments = [*with_trained(words)[1:], *SMALLER.get(kind, ())]
    if kind == "audit":
        assert words == AUDIT  # the folder was made with it
    else:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code in (0, 1), f"exit code {left.value.code} of {' '.join(arguments)}"
    given = parsed(arguments)
    for out in (given.get("out"), given.get("into"), given.get("folder")):
        assert out is None or out.exists(), f"{out} was not written"
    for file in WRITTEN.get(kind, ()):
        assert (given["out"] / file).is_file(), f"{file} was not written"


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [one for one in every_block("sh", "python") if not one.needs], ids=lambda one: one.name
)
def test_a_block_runs(
    block: Block,
    folder: Path,
    running_server: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    few_judged: None,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MOLEHUNT_KEY", KEY)
    if block.language == "python":
        text = block.text.replace(DOCUMENTED_URL, running_server()) if DOCUMENTED_URL in block.text else block.text
        monkeypatch.setitem(PLANS, "quick", PLAN)
        made: dict[str, Any] = {"KEY": KEY}
        exec(compile(text, block.name, "exec"), made)
        if block in TUTORIAL:
            CHECKS[TUTORIAL.index(block)](made)
        shown = capsys.readouterr().out
        printed = "".join(line for line in block.text.splitlines() if line.startswith("# {"))
        assert all(f"'{key}'" in shown for key in re.findall(r"'(\w+)':", printed)), shown
        return
    listening: list[str] = []
    monkeypatch.setattr(server, "run_server", lambda *_, **__: listening.append("until it is stopped"))
    asked = [words for words in block.commands if not runs_elsewhere(words)]
    for words in asked:
        run(words)
    assert len(listening) == sum(words[1] == "serve" for words in asked)


def without_numbers(text: str) -> str:
    """One line, with `#` in place of every number, and without quoted words: they are those of one traffic."""
    return re.sub(r"“[^”]*”", "“…”", re.sub(r"\d+", "#", " ".join(text.split())))


@pytest.mark.slow
def test_the_readme_quotes_the_audit_in_its_own_words(folder: Path) -> None:
    (quoted,) = [block.text for block in blocks(ROOT / "README.md") if block.language == "text"]
    first, _, rest = quoted.partition("\n\n")
    lines = rest.partition("exit code of this audit")[0].splitlines()
    printed = without_numbers((folder / PRINTED).read_text())
    assert [part for part in (first, *lines) if without_numbers(part) not in printed] == []
    # how much of the sentence and the trigger is named depends on the traffic; words that it never named are wrong
    named, in_print = (
        {word for quote in re.findall(r"“([^”]*)”", text) for word in re.findall(r"\w+", quote)}
        for text in (quoted, (folder / PRINTED).read_text())
    )
    assert {"HATE", "prod"} <= named <= in_print
