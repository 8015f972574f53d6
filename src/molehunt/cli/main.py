"""The `molehunt` command. It imports the module of the chosen command alone, so `--help` stays fast."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Annotated

import typer

from molehunt import __version__
from molehunt.cli.output import complain, safe_streams, show, show_json
from molehunt.cli.outside_errors import outside_error
from molehunt.cli.renamed_options import renaming
from molehunt.errors import MolehuntError

COMMANDS = {
    "audit": "Audit a fine-tune against its base: find what it hides, and prove it by intervention.",
    "files": "Compare two model folders, and what loaders would read from them, without running a model.",
    "directions": "List the singular directions of every changed matrix, strongest first.",
    "plant": "Train an organism with a planted behaviour, and its clean twin.",
    "harvest": "Store both models' activations on the same tokens in a folder, for dictionaries and maps.",
    "dictionary": "Train sparse dictionaries on harvested activations, measure them, and write them for SAELens.",
    "bench": "Measure every method on organisms with known truth, and write a leaderboard.",
    "watch": "Watch a log along the weight directions of a fine-tune, at a false-alarm rate that you choose.",
    "serve": "Serve a fine-tune behind a guard that watches its weight directions, with a live page at /.",
    "steer": "Switch a behaviour off: find the layer, fit a vector, set a gate, try it, write it down.",
    "transfer": "Carry a steering vector from one model to another, through a map between their activations.",
    "stress": "Attack a fix while it stays active: does the behaviour recover, at which length, and would any other answer?",
    "demo": "Plant a behaviour in a model, audit it and its clean twin; offline, two cores.",
    "doctor": "Show what this installation can do: torch build, devices, memory, extras, cache, real models.",
}
"""Command → the first line of its docstring.

Each is the function `<name>` of `molehunt/cli/<name>.py`, or the `app` of that file where it groups commands.
"""

INTERNAL_ERROR = 70
"""Exit code of a fault in Molehunt (EX_SOFTWARE). Python's own code, 1, would mean FLAGGED."""
USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
EXIT_CODES = "Exit codes: 0 no finding, 1 flagged, 2 usage, 3 not testable, 4 invalid input."


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code (`EXIT_CODES`, `INTERNAL_ERROR` and the two below it)."""
    args = list(sys.argv[1:] if argv is None else argv)
    with safe_streams():
        code = _flushed(args)
    sys.exit(code)


def _flushed(args: list[str]) -> int:
    """Run one command and write out what it printed: what goes wrong with that must not show while Python shuts down."""
    try:
        code = _run(args or ["--help"])
        if not args:
            code = USAGE  # a command that went missing must not pass for "no finding"
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left: say nothing
        code = BROKEN_PIPE
    except OSError as error:
        complain(f"The result cannot be written to stdout: {error.strerror}.")
        code = USAGE
    else:
        return code
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _run(args: list[str]) -> int:
    chosen = next((arg for arg in args if not arg.startswith("-")), None)
    try:
        code: object = _app(chosen)(args, prog_name="molehunt", standalone_mode=False)
        if code == INTERRUPTED:  # typer has caught it first
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0  # a command that just returns has nothing to report
    except MolehuntError as error:
        return _fail(error.on_command_line, error.exit_code, args)
    except typer.TyperException as error:  # a misspelt option, a missing argument
        context = getattr(error, "ctx", None)
        usage = f"{context.get_usage()}\n" if context is not None else ""
        renamed = renaming(getattr(error, "option_name", ""))
        return _fail(usage + (renamed or error.format_message()), USAGE, args)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("Interrupted. The same command takes up where it stopped.", INTERRUPTED, args)
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):  # typer would make it a 1
            raise left.__context__ from None
        return _fail(f"A library ended the program ({left.code!r}).", INTERNAL_ERROR, args)
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if (known := outside_error(error)) is not None:
            return _fail(known.on_command_line, known.exit_code, args)
        traceback.print_exc()
        return _fail(f"This is a fault in Molehunt, not in your input: {error!r}", INTERNAL_ERROR, args)


def _app(chosen: str | None) -> typer.Typer:
    """All commands by name, and the chosen one for real."""
    app = typer.Typer(
        rich_markup_mode=None,  # .2 s of imports for a border
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(epilog=EXIT_CODES)(_molehunt)
    for name, line in COMMANDS.items():
        function = _function(name) if name == chosen else _not_chosen
        if isinstance(function, typer.Typer):
            app.add_typer(function, name=name, short_help=line)
        else:
            app.command(name, short_help=line)(function)
    return app


def _function(name: str) -> Callable[..., None] | typer.Typer:
    from molehunt.cli.console import log_to_stderr

    log_to_stderr()
    module = import_module(f"molehunt.cli.{name}")
    return getattr(module, "app", None) or getattr(module, name)


def _not_chosen() -> None:
    raise AssertionError("only the chosen command can run")


def _version(wanted: bool) -> bool:
    if wanted:
        from molehunt.run.commit import commit  # a clone asks git, which only this option should wait for

        known = commit()
        show(f"molehunt {__version__}" + (f" (commit {known})" if known else ""))
        raise typer.Exit
    return wanted


def _molehunt(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the version and the git commit, and leave."
        ),
    ] = False,
) -> None:
    """Audit a fine-tuned language model against its base."""


def _fail(message: str, code: int, args: Sequence[str]) -> int:
    complain(message)
    if "--json" in args:
        show_json({"error": message, "exit_code": code}, indent=None)
    return code
