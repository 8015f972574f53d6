import ast
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer

from molehunt import __version__
from molehunt.cli import main as cli
from molehunt.cli.renamed_options import RENAMED
from molehunt.errors import InvalidInput, MolehuntError, NotTestable, UsageError
from molehunt.run.commit import commit

MOLEHUNT = str(Path(sys.executable).with_name("molehunt"))


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MOLEHUNT, *args], capture_output=True, text=True)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Stand a function in for `molehunt files`."""

    def install(function: Callable[..., None]) -> None:
        module = ModuleType("molehunt.cli.files")
        module.files = function  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "molehunt.cli.files", module)

    return install


def leave(*args: str) -> object:
    with pytest.raises(SystemExit) as left:
        cli.main(args)
    return left.value.code


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_one_line_help_is_the_docstrings_first_line(name: str) -> None:
    spec = find_spec(f"molehunt.cli.{name}")
    assert spec is not None and spec.origin is not None, f"molehunt/cli/{name}.py is missing"
    functions = [node for node in ast.parse(Path(spec.origin).read_text()).body if isinstance(node, ast.FunctionDef)]
    (function,) = [node for node in functions if node.name == name]
    documented = ast.get_docstring(function)
    assert documented is not None and documented.splitlines()[0] == cli.COMMANDS[name]


def test_every_command_file_is_in_the_table() -> None:
    spec = find_spec("molehunt.cli")
    assert spec is not None and spec.submodule_search_locations is not None
    files = [path for path in Path(spec.submodule_search_locations[0]).glob("*.py") if path.stem != "main"]

    def is_command(path: Path) -> bool:
        body = ast.parse(path.read_text()).body
        functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        named = {ast.unparse(target) for node in body if isinstance(node, ast.Assign) for target in node.targets}
        return path.stem in functions or "app" in named

    assert {path.stem for path in files if is_command(path)} == set(cli.COMMANDS)


def test_help_lists_every_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave("--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {line}" in shown for name, line in cli.COMMANDS.items())
    assert cli.EXIT_CODES in shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_is_its_own_and_imports_no_torch(name: str) -> None:
    watch = (
        "import sys; from molehunt.cli.main import main\ntry: main(sys.argv[1:])\n"
        "finally: print('HEAVY', [m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", watch, name, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Usage: molehunt {name}" in done.stdout
    assert cli.COMMANDS[name] in " ".join(done.stdout.split())
    assert "HEAVY []" in done.stdout


def test_version_names_the_commit_where_it_is_known() -> None:
    shown = run("--version")
    known = commit()
    expected = f"molehunt {__version__} (commit {known})\n" if known else f"molehunt {__version__}\n"
    assert (shown.returncode, shown.stdout) == (0, expected)


def test_no_argument_shows_help_and_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave() == 2
    assert "Usage: molehunt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["odit"], "No such command 'odit'"),
        (["--frobnicate"], "No such option: --frobnicate"),
        (["doctor", "--frobnicate"], "No such option: --frobnicate"),
        (["doctor", "extra"], "unexpected extra argument"),
    ],
)
def test_a_misspelt_command_line_is_exit_2(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(*args) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "Usage: molehunt" in shown.err and not shown.out
    assert leave(*args, "--json") == 2
    shown = capsys.readouterr()
    payload = json.loads(shown.out)
    assert payload["exit_code"] == 2 and payload["error"] in shown.err


def options(command: str) -> Iterator[tuple[list[str], set[str]]]:
    """The words of a command and its subcommands, each with its long options."""
    found = typer.main.get_command(cli._app(command))
    open_ = [([command], found.commands[command])]
    for words, one in open_:
        open_ += [([*words, name], below) for name, below in getattr(one, "commands", {}).items()]
        yield words, {name for param in one.params for name in param.opts if name.startswith("--")}


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_the_old_name_of_an_option_is_exit_2_and_names_the_new_one(old: str, new: str, capsys) -> None:
    known = [pair for command in cli.COMMANDS for pair in options(command)]
    renamed = [words for words, names in known if new in names and old not in names]
    assert renamed, f"no command has the option {new}"
    for words in renamed:
        assert leave(*words, old, "value", "--json") == 2
        shown = capsys.readouterr()
        assert f"{old} is now called {new}." in shown.err and "Usage: molehunt" in shown.err
        assert json.loads(shown.out)["exit_code"] == 2


@pytest.mark.parametrize(("error", "code"), [(MolehuntError, 2), (UsageError, 2), (NotTestable, 3), (InvalidInput, 4)])
def test_an_error_for_the_reader_has_its_exit_code_and_no_traceback(error, code: int, command, capsys) -> None:
    def files(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
        raise error("The shard is cut short. Fetch it again.")

    command(files)
    assert leave("files") == code
    assert capsys.readouterr() == ("", "The shard is cut short. Fetch it again.\n")
    assert leave("files", "--json") == code
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": "The shard is cut short. Fetch it again.", "exit_code": code}
    assert shown.err == "The shard is cut short. Fetch it again.\n"


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_commands_exit_code_is_ours(code: int, command) -> None:
    def files() -> None:
        raise typer.Exit(code)

    command(files)
    assert leave("files") == code


def test_a_command_that_returns_has_found_nothing(command) -> None:
    command(lambda: None)
    assert leave("files") == 0


def test_a_fault_of_ours_keeps_its_traceback_and_is_not_flagged(command, capsys) -> None:
    def files() -> None:
        raise ZeroDivisionError("oh")

    command(files)
    assert leave("files") == 70
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "fault in Molehunt" in printed and "ZeroDivisionError('oh')" in printed


def test_a_missing_command_module_is_a_fault_of_ours(monkeypatch, capsys) -> None:
    monkeypatch.setitem(cli.COMMANDS, "nowhere", "Not there.")
    assert leave("nowhere") == 70
    assert "No module named 'molehunt.cli.nowhere'" in capsys.readouterr().err
    assert leave("--version") == 0


def test_an_interrupt_is_130(command, capsys) -> None:
    def files() -> None:
        raise KeyboardInterrupt

    command(files)
    assert leave("files") == 130
    assert capsys.readouterr() == ("", "Interrupted. The same command takes up where it stopped.\n")


def test_warnings_of_the_package_reach_stderr_once(command, capsys) -> None:
    def files() -> None:
        logging.getLogger("molehunt.run.unit").warning("unit [bold]x[/bold] is damaged")

    command(files)
    assert leave("files") == leave("files") == 0
    assert capsys.readouterr().err == "unit [bold]x[/bold] is damaged\n" * 2


SLOW = """
import sys, time, types
module = types.ModuleType("molehunt.cli.files")
def files():
    print("ready", flush=True)
    {work}
module.files = files
sys.modules["molehunt.cli.files"] = module
from molehunt.cli.main import main
main(["files"])
"""


def test_ctrl_c_ends_with_130_and_no_traceback() -> None:
    # a shell's background jobs ignore SIGINT, and so would their children
    heeded = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", heeded + SLOW.format(work="time.sleep(60)")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted" in printed and "Traceback" not in printed


@pytest.mark.parametrize("work", ["print('x' * 10_000_000)", "print('x')"])
def test_a_reader_that_leaves_is_no_error(work: str) -> None:
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(work=f"sys.stdin.readline(); {work}")],
        stdin=subprocess.PIPE,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert stream.readline() == b"ready\n"
    _, printed = process.communicate("go\n", timeout=30)
    assert (process.returncode, printed) == (141, "")
