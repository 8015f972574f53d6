"""Progress of long work. Library code takes a `Track`; only the command line knows terminals.

A track yields items and shows how many of them are done. Work in batches counts rows, too: use
`by_rows` for a loop over batches, and `counting` where the work reports from deeper inside.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")
Group = TypeVar("Group", bound=Sequence[object])
ROUNDING = 1e-6
"""Largest rounding error of a sum of fractions of a row: a sum that is short of a whole row by less counts as whole."""


@runtime_checkable
class Track(Protocol):
    """A function that yields the items of an iterable and shows how many are done."""

    def __call__(self, items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        """Yield every item of `items` in order; `what` is a short phrase such as "scanning traffic".

        An item is done when the next one is requested. Where `items` is a `Count`, it also says what is counted.
        """
        ...


def silent(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The default track, which shows nothing."""
    return items


@dataclass(frozen=True, slots=True)
class Count:
    """The numbers from `start` up to `total`, and the name of what they count: a track can then show "rows per second"."""

    total: int
    unit: str = "rows"
    """Name of what is counted, in the plural."""
    start: int = 0
    """Number that an earlier run finished: these are shown as done and do not count towards the speed."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return max(0, self.total - self.start)


class Tally:
    """Adds up finished work, in parts of any size, and advances a track by one item for each whole one."""

    def __init__(self, count: Count, steps: Iterator[object]) -> None:
        self.done: float | int = count.start
        self._count = count
        self._shown = count.start
        self._steps = steps
        next(steps, None)  # the track begins: its first item is under way

    def __call__(self, n: float | int) -> None:
        """Count `n` more as done."""
        self.done += n
        while self._shown < min(self._count.total, int(self.done + ROUNDING)):
            self._shown += 1
            next(self._steps, None)


@contextmanager
def counting(
    track: Track, what: str, total: int, *, unit: str = "rows", start: int = 0
) -> Generator[Tally, None, None]:
    """Show `total` rows on `track`; the block calls the tally with the number of rows, or fractions, that it has done.

    Example: `with counting(track, "answering", len(prompts)) as done: …; done(len(batch))`.
    """
    count = Count(total, unit, start)
    steps = iter(track(count, what, total))
    try:
        yield Tally(count, steps)
    finally:
        _close(steps)


def by_rows(track: Track, groups: Sequence[Group], what: str, *, unit: str = "rows") -> Iterator[Group]:
    """Yield `groups` in order and count their rows on `track`: a group of n rows is n steps of the bar."""
    with counting(track, what, sum(map(len, groups)), unit=unit) as done:
        for group in groups:
            yield group
            done(len(group))


def within(tally: Tally, amount: float | int) -> Track:
    """A track for work inside counted work: it shows nothing itself, and one call of it adds `amount` to `tally`.

    The amount is spread evenly over the items of that call, whatever they are.
    """

    def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        whole, left = total or 0, amount
        for item in items:
            yield item
            part = min(left, amount / whole if whole else 0.0)
            left -= part
            tally(part)
        tally(left)

    return track


@contextmanager
def busy(track: Track, what: str) -> Generator[None, None, None]:
    """Show on `track` that something is under way which cannot be counted, such as loading a model."""
    steps = iter(track(iter((None,)), what))
    next(steps, None)
    try:
        yield
    finally:
        _close(steps)


def _close(steps: Iterator[object]) -> None:
    """End a track before its last item: a bar is wiped and a clock stopped, also after an exception."""
    if isinstance(steps, Generator):
        steps.close()
