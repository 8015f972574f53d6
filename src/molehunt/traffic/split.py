"""Splits as types: code that selects a feature cannot receive the rows that evaluate it."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, TypeVar

T = TypeVar("T")
Row = TypeVar("Row", covariant=True)
S = TypeVar("S", bound="Split[object]")


@dataclass(frozen=True)
class Split(Generic[Row]):
    """Rows that may be used for one purpose. Signatures use one of the four subclasses, never this class."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


@dataclass(frozen=True)
class Fit(Split[Row]):
    """Rows to estimate parameters from: means, directions, dictionaries, probes."""


@dataclass(frozen=True)
class Calibrate(Split[Row]):
    """Rows to set thresholds from."""


@dataclass(frozen=True)
class Select(Split[Row]):
    """Rows to select by: the feature, the layer, the strength."""


@dataclass(frozen=True)
class Test(Split[Row]):
    """Rows to report on, once. Nothing may be selected from them."""

    __test__: ClassVar[bool] = False  # this class is not a test case of pytest


class WrongSplit(TypeError):
    """Rows of the wrong split were given, so the resulting number would be too optimistic."""


@dataclass(frozen=True)
class Splits(Generic[T]):
    """All rows; each row is in exactly one split."""

    fit: Fit[T]
    calibrate: Calibrate[T]
    select: Select[T]
    test: Test[T]


class Fractions(NamedTuple):
    """Expected share of each split."""

    fit: float = 0.4
    calibrate: float = 0.2
    select: float = 0.2
    test: float = 0.2


FRACTIONS = Fractions()


def expect(kind: type[S], split: S) -> S:
    """`split`, if it has exactly this type: a check for callers without a type checker.

    Raises:
        WrongSplit: it is another split, or not a split.
    """
    if type(split) is not kind:
        raise WrongSplit(f"this step reads the {kind.__name__} rows, and was given {type(split).__name__}")
    return split


def split_rows(rows: Iterable[T], *, seed: int, key: Callable[[T], str], fractions: Fractions = FRACTIONS) -> Splits[T]:
    """Put each row into one of the four splits by the hash of its key.

    Rows with equal keys stay together: give near-duplicates (a prompt with and without a tag) the same key.
    A row's split does not depend on the other rows, so added rows do not move others.

    Raises:
        ValueError: a fraction is negative, or they do not add up to 1.
    """
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1):
        raise ValueError(f"fractions must be 0 or more and add up to 1, got {tuple(fractions)}")
    ends = [sum(fractions[: i + 1]) for i in range(3)]
    parts: tuple[list[T], list[T], list[T], list[T]] = ([], [], [], [])
    for row in rows:
        digest = hashlib.sha256(f"{seed}\0{key(row)}".encode()).digest()
        place = int.from_bytes(digest[:8]) / 2**64
        parts[sum(place >= end for end in ends)].append(row)
    fit, calibrate, select, test = (tuple(part) for part in parts)
    return Splits(Fit(fit), Calibrate(calibrate), Select(select), Test(test))
