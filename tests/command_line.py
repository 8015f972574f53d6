"""Command lines read as `molehunt` reads them, without running anything."""

import ast
import re
import tomllib
from functools import cache
from typing import Any

from typer.main import get_command

from doc_blocks import ROOT
from experiments.catalog import CATALOG as EXPERIMENTS
from molehunt.cli.main import COMMANDS, _app


@cache
def group(name: str) -> Any:
    return get_command(_app(name)).commands[name]  # pyright: ignore[reportAttributeAccessIssue]


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that these words behind `molehunt` name, and the rest of the words."""
    assert words and words[0] in COMMANDS, f"molehunt has no command {words[:1]}"
    command, rest = group(words[0]), words[1:]
    while hasattr(command, "commands") and rest:
        assert rest[0] in command.commands, f"molehunt {words[0]} has no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def options(command: Any) -> set[str]:
    """Every option of a command, and of the commands below it."""
    own = {name for one in command.params for name in (*one.opts, *one.secondary_opts) if name.startswith("-")}
    return own.union({"--help", "-h"}, *(options(one) for one in getattr(command, "commands", {}).values()))


def parsed(words: list[str]) -> dict[str, Any]:
    """Parameters of a complete command line. Raises where an option, a value or an argument is wrong."""
    command, rest = command_of(words)
    return command.make_context(command.name, list(rest)).params


def used_options(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}


def check_molehunt(words: list[str]) -> None:
    """The command is there and has every option of `words`, which follow `molehunt` and may be incomplete."""
    if not words or words[0].startswith("-"):
        assert used_options(words) <= {"--help", "-h", "--version"}, words
        return
    command, rest = command_of(words)
    unknown = used_options(rest) - options(command)
    assert not unknown, f"molehunt {words[0]} has no option {unknown}"


def script_options(name: str) -> set[str]:
    """What a script of this project declares, read from its source."""
    script = ROOT / name
    assert script.is_file(), f"there is no {name}"
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    added = [one for one in calls if isinstance(one.func, ast.Attribute) and one.func.attr == "add_argument"]
    return {str(argument.value) for one in added for argument in one.args if isinstance(argument, ast.Constant)}


def check_script(words: list[str]) -> None:
    """A script or module of this project exists and declares every option that it is given."""
    if words[:2] == ["-m", "experiments"]:
        topics = [word for word in words[2:3] if not word.startswith("--")]
        assert set(topics) <= {*EXPERIMENTS, "TOPIC"}, f"there is no experiment {topics}"
        words = ["experiments/__main__.py", *words[2 + len(topics) :]]
    unknown = {word for word in words[1:] if word.startswith("--")} - script_options(words[0])
    assert not unknown, f"{words[0]} has no option {unknown}"


def check_make(words: list[str]) -> None:
    """Every target is one of the Makefile, every variable one that it reads."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, sets, _ = word.partition("=")
        pattern = rf"^{re.escape(name)} *\?=" if sets else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"make knows no {name}"


def check_pip(words: list[str]) -> None:
    """What is installed is this package, with extras that it has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (package,) = [word for word in words[1:] if not word.startswith("-")]
    name, _, listed = package.partition("[")
    assert words[0] == "install" and name in {"molehunt", "."}, words
    assert set(filter(None, listed.rstrip("]").split(","))) <= extras.keys(), package


PROGRAMS = {"molehunt": check_molehunt, "make": check_make, "pip": check_pip, "python": check_script}


def check(words: list[str]) -> None:
    """One command line of any program that the documents name."""
    program = words[0].removeprefix(".venv/bin/")
    assert program in PROGRAMS, f"nothing checks {program}"
    PROGRAMS[program](words[1:])
