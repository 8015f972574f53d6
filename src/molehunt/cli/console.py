"""What the person at the terminal sees while work goes on: all on stderr, for stdout holds the result."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
EVERY = 10.0
"""Seconds between two plain progress lines."""


def say(text: str) -> None:
    """One message on stderr, above any progress bar, exactly as written: no markup, no wrapping."""
    track_on_stderr.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


class StderrTrack:
    """A `Track`: bars on a terminal, a plain line every 10 s elsewhere. Tracks may be nested."""

    def __init__(self) -> None:
        self._bars: Progress | None = None

    def __call__(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` in order while showing how far along they are."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # pyright: ignore[reportArgumentType]
        return self._drawn(items, what, total) if sys.stderr.isatty() else _lines(items, what, total)

    @property
    def console(self) -> Console:
        """Where bars are drawn now; printing elsewhere would tear them."""
        return self._bars.console if self._bars else Console(stderr=True)

    def _drawn(self, items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
        outermost = self._bars is None
        if self._bars is None:
            text, ahead = TextColumn("{task.description}", markup=False), TimeRemainingColumn()
            self._bars = Progress(
                text, BarColumn(), MofNCompleteColumn(), ahead, console=Console(stderr=True), transient=True
            )
            self._bars.start()
        bars = self._bars
        task = bars.add_task(what, total=total)
        try:
            for item in items:
                yield item
                bars.advance(task)
        finally:
            bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None


def _lines(items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    start = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - told >= EVERY:
            told = now
            say(f"{what}: {done}{f' of {total}' if total is not None else ''}, {now - start:.0f} s")
        yield item


track_on_stderr = StderrTrack()


class _Say(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def log_to_stderr() -> None:
    """Show the package's warnings with `say`. Called again, it changes nothing."""
    package = logging.getLogger("molehunt")
    if not any(isinstance(handler, _Say) for handler in package.handlers):
        package.addHandler(_Say())
