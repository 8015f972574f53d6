import io
import sys
from collections.abc import Iterable

import pytest

from molehunt.cli import console
from molehunt.cli.console import StderrTrack, say, track_on_stderr
from molehunt.run.progress import Track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """To be called by the test itself: between a fixture and its test pytest puts its own stderr back."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_say_prints_exactly_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[red]" + "long " * 60 + ":smile: 'quoted' 3.14"
    say(text)
    assert capsys.readouterr() == ("", text + "\n")


def test_a_quick_track_says_nothing_and_passes_all_items_on(capsys) -> None:
    assert isinstance(track_on_stderr, Track)
    assert list(track_on_stderr(range(4), "counting")) == [0, 1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_a_slow_track_says_a_plain_line_every_ten_seconds(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])

    def pass_time(items: Iterable[int]) -> None:
        for _ in items:
            now[0] += 4

    pass_time(track_on_stderr(range(7), "scanning [1]"))
    pass_time(track_on_stderr(iter(range(4)), "reading"))
    assert capsys.readouterr() == (
        "",
        "scanning [1]: 3 of 7, 12 s\nscanning [1]: 6 of 7, 24 s\nreading: 3, 12 s\n",
    )


def test_bars_may_be_nested_and_leave_the_terminal_as_it_was(monkeypatch, capsys) -> None:
    terminal = at_a_terminal(monkeypatch)
    track = track_on_stderr
    for outer in track([1, 2], "outer [x]"):
        for inner in track(iter([3, 4]), "inner", total=2):
            say(f"at {outer} {inner}")
            if (outer, inner) == (2, 4):
                shown = terminal.getvalue()
        assert track._bars is not None, "the outer bar outlives the inner one"
    assert track._bars is None
    assert "outer [x]" in shown and "inner" in shown and "at 2 4" in shown
    drawn = terminal.getvalue()
    assert drawn.rindex("\x1b[?25l") < drawn.rindex("\x1b[2K") < drawn.rindex("\x1b[?25h"), "wiped, cursor back"
    assert capsys.readouterr().out == ""


def test_bars_stop_when_the_work_fails(monkeypatch) -> None:
    at_a_terminal(monkeypatch)
    track = StderrTrack()
    with pytest.raises(RuntimeError, match="midway"):
        for _ in track([1, 2], "failing"):
            raise RuntimeError("midway")
    assert track._bars is None
    assert list(track([1], "again")) == [1]
