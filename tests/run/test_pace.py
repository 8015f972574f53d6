"""What a progress line says of speed and time left, on a clock that the tests turn."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from molehunt.run.pace import RECENT, SETTLING, Pace, rate_text, time_text


def steady(total: int, seconds: float, batch: int, done: int, *, began: float = 50.0, start: int = 0) -> Pace:
    """`done` rows in batches, each batch after `seconds`; the clock stands where the last one ended."""
    pace = Pace("scanning", total, unit="rows", start=start, now=began)
    for at in range(1, done // batch + 1):
        for _ in range(batch):
            pace.tick(began + at * seconds)
    return pace


@given(
    st.floats(0.01, 500.0),
    st.integers(1, 64),
    st.integers(3, 40),
    st.integers(41, 80),
    st.floats(0.0, 0.99),
)
def test_steady_work_is_told_its_true_speed_and_time_left(
    seconds: float, batch: int, done: int, total: int, into: float
) -> None:
    if seconds * done < SETTLING + seconds:
        done = 2 + int(SETTLING / seconds)
        total += done
    pace = steady(total * batch, seconds, batch, done * batch)
    now = 50.0 + seconds * (done + into)
    rate, left = pace.rate(now), pace.left(now)
    assert rate == pytest.approx(batch / seconds, rel=1e-6)
    assert left == pytest.approx(seconds * (total - done - into), rel=1e-6, abs=1e-6)


@given(st.integers(1, 500), st.floats(0.0, SETTLING - 0.01), st.floats(0.5, 100.0), st.integers(2, 20))
def test_what_comes_in_a_burst_at_the_start_is_no_speed(burst: int, when: float, seconds: float, done: int) -> None:
    pace = Pace("grid", burst + 1000, unit="cells", now=0.0)
    for _ in range(burst):
        pace.tick(when)
    assert pace.rate(when + 1.01 * RECENT) is None and pace.left(when + 1.01 * RECENT) is None, "nobody knows yet"
    first = SETTLING + seconds
    for i in range(done):
        pace.tick(first + i * seconds)
    now = first + (done - 1) * seconds
    rate = pace.rate(now)
    assert rate == pytest.approx(done / (now - when), rel=1e-6)
    assert pace.text(now).startswith(f"{burst + done} of {burst + 1000} cells, ")


@given(st.integers(1, 5000), st.floats(0.1, 10.0))
def test_what_an_earlier_run_did_is_shown_and_left_out_of_the_speed(start: int, seconds: float) -> None:
    pace = steady(start + 100, seconds, 1, 60, start=start, began=0.0)
    now = 60 * seconds
    assert pace.done == start + 60
    assert pace.rate(now) == pytest.approx(1 / seconds, rel=1e-6)
    assert pace.left(now) == pytest.approx(40 * seconds, rel=1e-6)


def test_work_that_stands_still_slows_down() -> None:
    pace = steady(100, 1.0, 1, 10, began=0.0)
    before = pace.rate(12.0)
    assert before is not None
    rate, left = pace.rate(10_000.0), pace.left(10_000.0)
    assert rate is not None and rate < before / 100
    assert left is not None and left > 9_000


@given(st.lists(st.floats(0.0, 30.0), min_size=1, max_size=60), st.integers(0, 5), st.booleans(), st.floats(0, 1e6))
@example(gaps=[2.225073858507203e-309], more=0, known=False, began=0.0)
def test_any_history_gives_a_readable_line(gaps: list[float], more: int, known: bool, began: float) -> None:
    total = len(gaps) + more if known else None
    pace = Pace("doing", total, unit="rows", now=began)
    now = began
    for gap in gaps:
        now += gap
        assert readable(pace.line(now), known)
        pace.tick(now)
    assert readable(pace.line(now), known)
    left = pace.left(now)
    assert left is None or left >= 0


def readable(line: str, known: bool) -> bool:
    number = r"\d+(\.\d)? (rows/(s|min|h))"
    time = r"(\d+ s|\d+ min|\d+ h \d+ min) (left|so far)"
    counted = r"\d+ of \d+ rows" if known else r"\d+ rows"
    return bool(re.fullmatch(rf"doing: ({counted}, )?({number}, )?{time}", line))


def test_the_words() -> None:
    pace = Pace("scanning traffic", 2000, unit="rows", now=0.0)
    assert pace.line(2.0) == "scanning traffic: 0 of 2000 rows, 2 s so far"
    for i in range(320):
        pace.tick((i + 1) / 41)
    assert pace.line(320 / 41) == "scanning traffic: 320 of 2000 rows, 41 rows/s, 41 s left"
    unnamed = Pace("attack", 7, now=0.0)
    assert unnamed.line(3.0) == "attack: 0 of 7, 3 s so far"
    unnamed.tick(5.0)
    assert unnamed.line(5.0) == "attack: 1 of 7, 30 s left"
    assert Pace("loading a and b", None, now=1.0).line(13.4) == "loading a and b: 12 s so far"


@pytest.mark.parametrize(
    ("rate", "text"),
    [(412.4, "412 rows/s"), (41.0, "41 rows/s"), (9.96, "10 rows/s"), (3.21, "3.2 rows/s"), (1.0, "1.0 rows/s"),
     (0.4, "24 rows/min"), (1 / 60, "1.0 rows/min"), (1 / 600, "6.0 rows/h")],
)  # fmt: skip
def test_speeds(rate: float, text: str) -> None:
    assert rate_text(rate, "rows") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (41.4, "41 s"), (99.4, "99 s"), (99.6, "2 min"), (720.0, "12 min"), (5939.0, "99 min"),
     (6000.0, "1 h 40 min"), (12_000.0, "3 h 20 min")],
)  # fmt: skip
def test_times(seconds: float, text: str) -> None:
    assert time_text(seconds) == text
