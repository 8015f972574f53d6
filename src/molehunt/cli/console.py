"""What the terminal shows while work goes on. All of it goes to stderr, because stdout holds the result."""

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from molehunt.cli.output import unwrapped, wrap_streams
from molehunt.errors import terminal_text
from molehunt.run.pace import Pace
from molehunt.run.progress import Count

T = TypeVar("T")
FIRST = 2.0
"""Seconds until the first plain progress line. Work that ends sooner prints none."""
EVERY = 10.0
"""Seconds between two plain progress lines."""
BAR = 4, 20
"""Least and greatest width of a bar, in characters. On a narrow terminal the name and the numbers take precedence."""

CLOCK = "molehunt-progress"
"""Name of the thread that prints plain lines."""


def say(text: str) -> None:
    """One message on stderr, above any progress bar: no markup, no wrapping, and all text through `terminal_text`."""
    track_on_stderr.say(text)


class StderrTrack:
    """A `Track` that draws bars on a terminal, and elsewhere prints a line after 2 s and then every 10 s.

    Tracks may be nested: each has a bar of its own, or its part of the one plain line.
    """

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._lines = _Lines(self.say)

    def __call__(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` in order while showing how far along they are."""
        pace = _pace(items, terminal_text(what, kept=""), total)
        with self._bar(pace) if sys.stderr.isatty() else self._lines.shown(pace):
            for item in items:
                yield item
                pace.tick(time.monotonic())

    @property
    def console(self) -> Console:
        """The console that draws the bars now; printing elsewhere would break them."""
        return self._bars.console if self._bars else Console(stderr=True)

    def say(self, text: str) -> None:
        """One message, as the function `say` prints it."""
        self.console.print(terminal_text(text), markup=False, highlight=False, emoji=False, soft_wrap=True)

    @contextmanager
    def _bar(self, pace: Pace) -> Generator[None, None, None]:
        outermost = self._bars is None
        if self._bars is None:
            name = TextColumn("{task.description}", markup=False)
            bar = _Bar(None, table_column=Column(min_width=BAR[0], max_width=BAR[1]))
            numbers = _Numbers(table_column=Column(no_wrap=True))
            self._bars = Progress(name, bar, numbers, console=Console(file=unwrapped(sys.stderr)), transient=True)
            self._bars.start()
            wrap_streams()  # rich prints above the bars now; its `stop` puts back the streams that were there
        bars = self._bars
        task = bars.add_task(pace.what, total=pace.total, pace=pace)
        try:
            yield
        finally:
            bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None


def _pace(items: Iterable[object], what: str, total: int | None) -> Pace:
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # pyright: ignore[reportArgumentType]
    unit, start = (items.unit, items.start) if isinstance(items, Count) else ("", 0)
    return Pace(what, total, unit=unit, start=start, now=time.monotonic())


class _Bar(BarColumn):
    """Reads the count only when it is drawn, so that counting a row costs almost nothing."""

    def render(self, task: Task) -> ProgressBar:
        task.completed = task.fields["pace"].done
        return super().render(task)


class _Numbers(ProgressColumn):
    """Count, total, speed and time left: the same text as in a plain line."""

    def render(self, task: Task) -> Text:
        pace: Pace = task.fields["pace"]
        return Text(pace.text(time.monotonic()))


class _Lines:
    """Prints one line about all open tracks when it is due. A thread watches the clock while there are any.

    Only that thread prints, so no line falls between the rows of one batch, which are counted one after the other.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._open: list[Pace] = []
        """Outermost first."""
        self._due = math.inf
        self._printed = "", -math.inf
        """Name of the outermost track in the latest line, and when that was printed."""
        self._lock = threading.RLock()  # a garbage collection while it is held may close a track
        self._closed = threading.Event()
        self._clock: threading.Thread | None = None

    @contextmanager
    def shown(self, pace: Pace) -> Generator[None, None, None]:
        with self._lock:
            if not self._open:
                what, at = self._printed
                # many short tracks of one name in a row print no more lines than a long one
                self._due = max(pace.began + FIRST, at + EVERY if what == pace.what else -math.inf)
                self._closed = threading.Event()
                self._clock = threading.Thread(target=self._watch, args=(self._closed,), name=CLOCK, daemon=True)
                self._clock.start()
            self._open.append(pace)
        try:
            yield
        finally:
            with self._lock:
                self._open.remove(pace)
                clock = None if self._open else self._clock
                if clock is not None:
                    self._closed.set()
            if clock is not None and clock is not threading.current_thread():
                clock.join(FIRST)  # a line that it has started is printed before the next message

    def print_if_due(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._due or not self._open:
                return
            outer, *inner = self._open
            self._due, self._printed = now + EVERY, (outer.what, now)
            slow = [pace for pace in inner if now - pace.began >= FIRST]
            self._say("; ".join(pace.line(now) for pace in (outer, *slow)))

    def _watch(self, closed: threading.Event) -> None:
        while not closed.wait(max(0.01, self._due - time.monotonic())):
            try:
                self.print_if_due()
            except (OSError, ValueError):  # stderr is closed: nobody reads on
                return


track_on_stderr = StderrTrack()


class _Say(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def log_to_stderr() -> None:
    """Show the package's warnings with `say`. Called again, it changes nothing."""
    package = logging.getLogger("molehunt")
    if not any(isinstance(handler, _Say) for handler in package.handlers):
        package.addHandler(_Say())
