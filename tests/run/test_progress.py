"""Counting rows on a track that knows items alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehunt.run.progress import Count, Tally, Track, busy, by_rows, counting, silent, within
from watched_track import WatchedTrack


def test_they_are_tracks() -> None:
    assert isinstance(WatchedTrack(), Track) and isinstance(silent, Track)
    with counting(silent, "x", 3) as done:
        assert isinstance(within(done, 1), Track)


@given(st.lists(st.lists(st.integers(), max_size=70), max_size=12))
def test_a_group_counts_as_its_rows(groups: list[list[int]]) -> None:
    track = WatchedTrack()
    rows = 0
    for group in by_rows(track, groups, "answering"):
        assert track.last.done == rows, "a group is done when the next is asked for"
        rows += len(group)
    shown = track.last
    assert (shown.what, shown.total, shown.items) == ("answering", rows, Count(rows, "rows"))
    assert (shown.done, shown.open, len(track.calls)) == (rows, False, 1)
    assert [list(g) for g in by_rows(silent, groups, "answering")] == groups


@given(st.integers(1, 300), st.integers(1, 97), st.integers(0, 50))
def test_fractions_add_up_to_whole_rows(rows: int, parts: int, start: int) -> None:
    track = WatchedTrack()
    with counting(track, "reading", start + rows, start=start) as done:
        for part in range(1, parts + 1):
            done(rows / parts)
            assert track.last.done == int(rows * part / parts + 1e-6)
    assert track.last.items == Count(start + rows, "rows", start)
    assert list(Count(start + rows, "rows", start)) == list(range(start, start + rows))
    assert (track.last.total, track.last.done, track.last.open) == (start + rows, rows, False)


def test_more_than_all_and_less_than_all_do_no_harm() -> None:
    track = WatchedTrack()
    with counting(track, "reading", 3) as done:
        done(10)
        done(-9)
        done(1)
    with counting(track, "reading", 3) as done:
        done(1)
    with counting(track, "reading", 0) as done:
        done(0)
    assert [(call.done, call.open) for call in track.calls] == [(3, False), (1, False), (0, False)]


@pytest.mark.parametrize("share", [1, 0.5, 1 / 3])
@pytest.mark.parametrize(("items", "total"), [(7, 7), (7, None), (5, 7), (9, 7), (0, 0)])
def test_work_inside_spends_its_amount_whatever_it_counts(share: float, items: int, total: int | None) -> None:
    track = WatchedTrack()
    with counting(track, "scanning", 64) as done:
        inner = within(done, 64 * share)
        seen: list[float] = []
        for item in inner(range(items), "answering", total):
            assert item == len(seen)
            seen.append(done.done)
        assert done.done == pytest.approx(64 * share)
        assert seen == sorted(seen)
        if items == total == 7:
            assert seen == pytest.approx([64 * share * i / 7 for i in range(7)])
    assert len(track.calls) == 1, "the work inside is not shown by itself"
    assert track.last.done == int(64 * share + 1e-6)


def test_counted_work_inside_counted_work() -> None:
    track = WatchedTrack()
    with counting(track, "scanning", 100) as done:
        for batch in by_rows(within(done, 50), [range(8), range(2)], "answering"):
            assert track.last.done == (0 if len(batch) == 8 else 40)
        assert track.last.done == 50
        done(50)
    assert track.last.done == 100


def fails(track: Track, how: str) -> None:
    if how == "by_rows":
        for _ in by_rows(track, [[1, 2]], "x"):
            raise RuntimeError("midway")
    with counting(track, "x", 4) if how == "counting" else busy(track, "x"):
        raise RuntimeError("midway")


@pytest.mark.parametrize("how", ["by_rows", "counting", "busy"])
def test_an_exception_closes_the_track_at_once(how: str) -> None:
    track = WatchedTrack()
    with pytest.raises(RuntimeError, match="midway"):
        fails(track, how)
    assert [call.open for call in track.calls] == [False]


def test_what_cannot_be_counted_has_no_total() -> None:
    track = WatchedTrack()
    with busy(track, "loading a and b"):
        assert (track.last.what, track.last.total, track.last.open) == ("loading a and b", None, True)
        assert not hasattr(track.last.items, "__len__")
    assert not track.last.open
    with busy(silent, "loading"):
        pass


def test_a_tally_begins_its_track() -> None:
    begun: list[int] = []
    Tally(Count(2), (begun.append(i) for i in range(2)))
    assert begun == [0]
