"""Whatever text is shown, no character of it moves, hides, reorders or recolours anything on a terminal."""

import ast
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehunt.cli import console
from molehunt.cli.output import SafeStream, safe_streams, show, show_json
from molehunt.errors import json_text, printable, terminal_text

PACKAGE = Path(__file__).parents[2] / "src" / "molehunt"
TEXT = st.text(st.characters() | st.sampled_from('\x1b\x07\x9b\x7f\u202e\u2066\u200b\u2028\ud800\r\n\t\\"é字🙂'))
EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\u009b31m\ud800\u2028\r"


def harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@given(TEXT)
def test_what_is_shown_is_harmless_and_what_was_harmless_stays(text: str) -> None:
    shown = terminal_text(text)
    assert harmless(shown) and terminal_text(shown) == shown
    assert shown.count("\n") == text.count("\n")
    if harmless(text):
        assert shown == text
    shown.encode("utf-8")


@given(TEXT, st.integers(1, 40))
def test_a_name_is_one_line_and_cut(text: str, limit: int) -> None:
    name = printable(text, limit)
    assert name.isprintable() and len(name) <= limit
    whole = terminal_text(text, kept="")
    assert name == whole if len(whole) <= limit else whole.startswith(name[:-1]) and name.endswith("…")


@given(
    st.recursive(TEXT | st.integers() | st.none(), lambda one: st.lists(one) | st.dictionaries(TEXT, one)),
    st.booleans(),
)
def test_json_is_the_same_value_and_harmless(value: object, ascii_only: bool) -> None:
    raw = json.dumps(value, ensure_ascii=False, indent=2)
    shown = json_text(raw, ascii_only=ascii_only)
    assert harmless(shown) and json.loads(shown) == json.loads(raw)
    assert shown.isascii() or not ascii_only


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
@given(text=TEXT)
def test_every_stream_takes_every_text(encoding: str, text: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    SafeStream(stream).write(f"x{text}")
    stream.flush()
    written = raw.getvalue().decode(encoding)
    assert all(c.isprintable() or c in "\n\t" for c in written)
    show_in(stream, {"text": text})
    stream.flush()
    assert json.loads(raw.getvalue().decode(encoding)[len(written) :]) == {"text": text}


def show_in(stream: io.TextIOWrapper, value: object) -> None:
    before, sys.stdout = sys.stdout, SafeStream(stream)
    try:
        show_json(value)
    finally:
        sys.stdout = before


def test_what_libraries_print_is_escaped_and_bars_may_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    with safe_streams():
        print(f"library: {EVIL}")
        sys.stderr.write(f"warning: {EVIL}\n")
        sys.stderr.write("\x1b[A")
        sys.stderr.write("\rLoading:  10%")
        show(EVIL)
        with safe_streams():  # once is enough
            show("plain")
    shown = capsys.readouterr()
    assert harmless(shown.out) and shown.out.endswith("\nplain\n")
    assert r"library: \x1b]0;owned\x07\x1b[2J\u202e\x9b31m\ud800\u2028\x0d" in shown.out
    assert shown.err.endswith("\x1b[A\rLoading:  10%") and shown.err.count("\x1b") == 1
    assert not isinstance(sys.stdout, SafeStream)


def test_messages_and_progress_are_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "FIRST", 0.0)
    console.say(f"reading {EVIL}\nnext")
    lines = console._Lines(console.say)
    with lines.shown(console._pace([1], terminal_text(EVIL, kept=""), None)):
        lines.print_if_due()
    shown = capsys.readouterr().err
    assert harmless(shown) and "\nnext\n" in shown and "owned" in shown


class Screen(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_bar_shows_a_name_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    for name, value in {"TERM": "xterm", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", screen)
    with safe_streams():
        track = console.StderrTrack()
        for _ in track(range(2), f"reading {EVIL}"):
            print(f"library {EVIL}", file=sys.stderr)
            track.say(f"message {EVIL}")
    shown = screen.getvalue()
    assert r"\x1b]0;owned" in shown and "\x1b]0" not in shown and "\u202e" not in shown and "\x9b" not in shown
    assert "library" in shown and "message" in shown


# ------------------------------------------------------------------------------------------------ held by the source


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


SOURCES = sorted(PACKAGE.rglob("*.py"))
WRITERS = {
    "typer.echo",
    "typer.secho",
    "click.echo",
    "rich.print",
    "sys.stdout.write",
    "sys.stderr.write",
    "sys.__stdout__.write",
}
MAY = {"cli/output.py": {"sys.stdout.write", "sys.stderr.write"}}


def test_nothing_is_printed_past_the_one_function() -> None:
    found: list[str] = []
    for path in SOURCES:
        name = path.relative_to(PACKAGE).as_posix()
        for call in calls(path):
            function = ast.unparse(call.func)
            to_file = any(
                keyword.arg == "file" and "std" not in ast.unparse(keyword.value) for keyword in call.keywords
            )
            if function in WRITERS - MAY.get(name, set()) or (function == "print" and not to_file):
                found.append(f"{name}:{call.lineno} {function}")
            if function.endswith("console.print") and not ast.unparse(call.args[0]).startswith("terminal_text("):
                found.append(f"{name}:{call.lineno} {function}")
    assert not found


def test_every_summary_is_text_for_a_terminal() -> None:
    found: list[str] = []
    seen = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or node.name != "summary" or ast.unparse(node.body[-1]) == "...":
                continue
            seen += 1
            returned = [ast.unparse(one.value) for one in ast.walk(node) if isinstance(one, ast.Return) and one.value]
            if not all(text.startswith("terminal_text(") or ".summary(" in text for text in returned):
                found.append(f"{path.relative_to(PACKAGE).as_posix()}:{node.lineno}")
    assert seen > 15 and not found
