"""How long work tells whoever waits. Library code takes a `Track`; only the command line knows terminals."""

from collections.abc import Iterable
from typing import Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@runtime_checkable
class Track(Protocol):
    """Yields the items of an iterable and shows how far along it is."""

    def __call__(self, items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        """Yield every item of `items` in order; `what` is a short phrase such as "scanning traffic"."""
        ...


def silent(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The default: a library says nothing."""
    return items
