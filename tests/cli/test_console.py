import io
import re
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehunt.cli import console
from molehunt.cli.console import EVERY, FIRST, StderrTrack, say, track_on_stderr
from molehunt.run.progress import Track, busy, by_rows, counting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """To be called by the test itself: between a fixture and its test pytest puts its own stderr back."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that tracks see: `clock[0] += 1` lets a second pass."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines come twenty times as often, so that a test can wait for them."""
    monkeypatch.setattr(console, "FIRST", FIRST / 20)
    monkeypatch.setattr(console, "EVERY", EVERY / 20)


def clocks() -> list[threading.Thread]:
    """Threads that watch for a line that is due."""
    return [thread for thread in threading.enumerate() if thread.name == console.CLOCK]


def test_say_prints_exactly_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[red]" + "long " * 60 + ":smile: 'quoted' 3.14"
    say(text)
    assert capsys.readouterr() == ("", text + "\n")


def test_a_quick_track_says_nothing_and_passes_all_items_on(capsys) -> None:
    assert isinstance(track_on_stderr, Track)
    assert list(track_on_stderr(range(4), "counting")) == [0, 1, 2, 3]
    for _ in by_rows(track_on_stderr, [range(8)] * 4, "counting"):
        time.sleep(0.02)
    with busy(track_on_stderr, "loading"):
        pass
    assert clocks() == []
    assert capsys.readouterr() == ("", "")


def pass_time(track: StderrTrack, clock: list[float], seconds: float) -> None:
    """Let time pass, and the thread that prints have its turn every second."""
    for _ in range(int(seconds)):
        clock[0] += 1
        track._lines.print_if_due()


def test_a_slow_track_says_a_plain_line_after_two_seconds_and_then_every_ten(capsys, clock: list[float]) -> None:
    track = StderrTrack()
    for _ in by_rows(track, [range(20)] * 6, "scanning [1]"):
        pass_time(track, clock, 4)
    for _ in track(iter(range(4)), "reading"):
        pass_time(track, clock, 4)
    assert capsys.readouterr() == (
        "",
        "scanning [1]: 0 of 120 rows, 2 s so far\n"
        "scanning [1]: 40 of 120 rows, 5.0 rows/s, 12 s left\n"
        "scanning [1]: 100 of 120 rows, 5.0 rows/s, 2 s left\n"
        "reading: 2 s so far\n"
        "reading: 2, 12 s so far\n",
    )


@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 64), st.integers(0, 500))
def test_lines_come_on_time_with_true_rows_speed_and_time_left(
    groups: int, seconds: int, batch: int, start: int
) -> None:
    """A group of `batch` rows takes `seconds`, however long that is."""
    now = [0.0]
    lines: list[tuple[float, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console.time, "monotonic", lambda: now[0])
        track = StderrTrack()
        patch.setattr(track._lines, "_say", lambda line: lines.append((now[0], line)))
        total = start + groups * batch
        with counting(track, "scanning", total, start=start) as done:
            for _ in range(groups):
                pass_time(track, now, seconds)
                done(batch)
    assert [at for at, _ in lines] == [float(at) for at in range(2, groups * seconds + 1, 10)]
    for at, line in lines:
        ended = max(0, int(at - 1) // seconds)  # a line at the very second in which a group ends comes before it
        assert line.startswith(f"scanning: {start + ended * batch} of {total} rows, ")
        if ended * seconds > 2 * FIRST:
            assert parsed_rate(line) == pytest.approx(batch / seconds, rel=0.06)
            left = groups * seconds - at
            assert parsed_left(line) == pytest.approx(left, abs=max(0.6, 0.01 * left) if left < 99 else 31)


def parsed_rate(line: str) -> float:
    found = re.search(r"([\d.]+) rows/(s|min|h)", line)
    assert found is not None, line
    return float(found[1]) / {"s": 1, "min": 60, "h": 3600}[found[2]]


def parsed_left(line: str) -> float:
    found = re.search(r"(?:(\d+) h )?(\d+) (s|min) left", line)
    assert found is not None, line
    return 3600 * int(found[1] or 0) + int(found[2]) * (1 if found[3] == "s" else 60)


def test_nested_tracks_share_one_line_and_short_ones_are_left_out(capsys, clock: list[float]) -> None:
    track = StderrTrack()
    for i in track(range(3), "outer"):
        for _ in by_rows(track, [range(3)] * 5, "quick"):
            clock[0] += 0.1
            track._lines.print_if_due()
        if i:
            for _ in by_rows(track, [range(8)] * 3, "slow"):
                pass_time(track, clock, 4)
    assert capsys.readouterr().err.splitlines() == [
        "outer: 1 of 3, 3 s so far; slow: 0 of 24 rows, 2 s so far",
        "outer: 1 of 3, 13 s so far; slow: 16 of 24 rows, 2.0 rows/s, 0 s left",
        "outer: 2 of 3, 2 s left; slow: 16 of 24 rows, 2.0 rows/s, 2 s left",
    ]


def test_many_short_tracks_of_one_name_say_no_more_than_a_long_one(capsys, clock: list[float]) -> None:
    track = StderrTrack()
    for _ in range(8):
        for _ in track(range(4), "attack"):
            pass_time(track, clock, 1)
    assert capsys.readouterr().err.splitlines() == [
        "attack: 1 of 4, 2 s so far",
        "attack: 3 of 4, 0 s left",
        "attack: 1 of 4, 2 s so far",
        "attack: 3 of 4, 0 s left",
    ]


def test_the_first_line_comes_while_the_first_item_is_still_under_way(capsys, hurried: None) -> None:
    track = StderrTrack()
    begun = time.monotonic()
    with counting(track, "scanning traffic", 2000) as done:
        while not (first := capsys.readouterr().err):
            assert time.monotonic() - begun < 5
            time.sleep(0.005)
        assert time.monotonic() - begun >= console.FIRST
        assert first == "scanning traffic: 0 of 2000 rows, 0 s so far\n"
        assert len(clocks()) == 1
        done(500)
        time.sleep(1.2 * console.EVERY)
    assert re.fullmatch(r"scanning traffic: 500 of 2000 rows, .* rows/s, \d+ s left\n", capsys.readouterr().err)
    assert clocks() == [], "the clock has stopped"


def test_work_that_cannot_be_counted_says_that_it_goes_on(capsys, hurried: None) -> None:
    with busy(track_on_stderr, "loading a and b"):
        time.sleep(5 * console.FIRST)
    assert capsys.readouterr().err == "loading a and b: 0 s so far\n"


def cut_short(how: str, track: StderrTrack) -> None:
    if how == "item":
        for _ in track(range(3), "failing"):
            raise RuntimeError("midway")
    if how == "rows":
        for _ in by_rows(track, [[1], [2]], "failing"):
            raise RuntimeError("midway")
    if how == "source":
        broken = (1 / n for n in (1, 0))
        list(track(broken, "failing"))
    if how == "nested":
        with counting(track, "outer", 2), busy(track, "inner"):
            raise RuntimeError("midway")


@pytest.mark.parametrize("how", ["item", "rows", "source", "nested"])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_exception_ends_bars_lines_and_their_thread(
    monkeypatch: pytest.MonkeyPatch, hurried: None, how: str, terminal: bool
) -> None:
    screen = at_a_terminal(monkeypatch) if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    track = StderrTrack()
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        cut_short(how, track)
    assert clocks() == []
    assert track._bars is None and track._lines._open == []
    shown = screen.getvalue()
    time.sleep(3 * console.FIRST)
    assert screen.getvalue() == shown, "nothing is drawn or said after the end"
    assert list(track([1], "again")) == [1]


def test_a_closed_stderr_ends_the_lines_and_not_the_work(monkeypatch: pytest.MonkeyPatch, hurried: None) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(closed, "isatty", lambda: False, raising=False)
    track = StderrTrack()
    monkeypatch.setattr(track._lines, "_say", lambda line: closed.write(line))
    with busy(track, "loading"):
        time.sleep(3 * console.FIRST)
        assert track._lines._clock is not None and not track._lines._clock.is_alive()


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


def test_a_bar_counts_rows_and_says_their_speed_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    terminal = at_a_terminal(monkeypatch)
    track = StderrTrack()
    drawn: list[str] = []
    with counting(track, "scanning clean prompts", 2000, start=1000) as done:
        for _ in range(4):
            clock[0] += 10
            done(100)
            assert track._bars is not None
            track._bars.refresh()
            drawn.append(re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue()).split("scanning")[-1])
            assert "…" not in drawn[-1]
    numbers = [line.split("1", 1)[1].strip() for line in drawn]
    assert numbers[0] == "100 of 2000 rows, 10 rows/s, 90 s left"
    assert numbers[3] == "400 of 2000 rows, 10 rows/s, 60 s left"
    filled = [line.count("━") + line.count("╸") for line in drawn]
    assert filled[3] >= filled[0] > 0 and "1400" in drawn[3]


def test_a_bar_without_a_total_says_that_work_goes_on(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    terminal = at_a_terminal(monkeypatch)
    track = StderrTrack()
    with busy(track, "loading a and b"):
        clock[0] += 7
        assert track._bars is not None
        track._bars.refresh()
        assert "loading a and b" in terminal.getvalue() and "7 s so far" in terminal.getvalue()


def test_names_of_any_kind_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_a_terminal(monkeypatch)
    with busy(StderrTrack(), "loading [red]x and :smile:"):
        pass
    assert "[red]x and :smile:" in terminal.getvalue()
