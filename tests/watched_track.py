"""A track that remembers what it was shown, for tests of progress."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from molehunt.run.progress import Count


@dataclass
class Shown:
    """One call of the track."""

    what: str
    total: int | None
    items: Iterable[Any]
    done: int = 0
    """Number of items that were requested and finished."""
    open: bool = True

    @property
    def unit(self) -> str | None:
        return self.items.unit if isinstance(self.items, Count) else None

    @property
    def start(self) -> int:
        return self.items.start if isinstance(self.items, Count) else 0


class WatchedTrack:
    """A `Track`. `calls` holds one entry for each time that it was called."""

    def __init__(self) -> None:
        self.calls: list[Shown] = []

    def __call__(self, items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
        call = Shown(what, total, items)
        self.calls.append(call)
        try:
            for item in items:
                yield item
                call.done += 1
        finally:
            call.open = False

    @property
    def last(self) -> Shown:
        return self.calls[-1]
