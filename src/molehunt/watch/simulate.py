"""A benign stream with attacks inserted, repeated and in several orders: does a monitor still see the hundredth one?

Compared are the split-conformal monitor, which quarantines what it flags, and the published running range, which takes in
every row, flagged or not: there an attack that was seen once is normal from then on.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from molehunt.measure.interval import Interval, proportion
from molehunt.watch.monitor import Monitor
from molehunt.watch.profile import Profile
from molehunt.watch.ranges import RunningRange

Order = Literal["spread", "burst", "rising"]
ORDERS: tuple[Order, ...] = ("spread", "burst", "rising")
"""Attacks at random places; all repeats of one attack in a row; weakest attack first, so that each widens what is normal."""


@dataclass(frozen=True, eq=False, slots=True)
class StreamEvent:
    """One row of the stream."""

    profile: Profile
    repeat: int
    """0 for a benign row; 1 for an attack's first sight."""


@dataclass(frozen=True, kw_only=True)
class MonitorSimulation:
    """The rows of a simulated stream that one monitor flagged."""

    monitor: str
    order: Order
    fpr: Interval
    """Share of benign rows flagged."""
    first_sight: Interval
    """Share of attacks flagged at their first appearance."""
    by_repeat: dict[int, Interval]
    """Share of attacks flagged at their 1st, 2nd, 3rd, 10th … appearance."""


def events(
    benign: Sequence[Profile],
    attacks: Sequence[Profile],
    *,
    repeats: int,
    order: Order,
    seed: int,
    strength: Callable[[Profile], float],
) -> list[StreamEvent]:
    """The stream: every attack `repeats` times among the benign rows, which keep their order.

    Args:
        strength: what "rising" sorts attacks by.
    """
    rng = Random(seed)
    inserted = [StreamEvent(attack, repeat) for attack in attacks for repeat in range(1, repeats + 1)]
    if order == "spread":
        counted: dict[int, int] = {}
        shuffled = [attack for attack in attacks for _ in range(repeats)]
        rng.shuffle(shuffled)
        inserted = []
        for attack in shuffled:
            counted[id(attack)] = counted.get(id(attack), 0) + 1
            inserted.append(StreamEvent(attack, counted[id(attack)]))
    elif order == "rising":
        inserted = [StreamEvent(a, repeat) for a in sorted(attacks, key=strength) for repeat in range(1, repeats + 1)]
    places = sorted(rng.sample(range(len(benign) + len(inserted)), len(inserted)))
    at, found = set(places), list[StreamEvent]()
    waiting, clean = iter(inserted), iter(benign)
    for place in range(len(benign) + len(inserted)):
        found.append(next(waiting) if place in at else StreamEvent(next(clean), 0))
    return found


def simulate(
    monitor: Monitor,
    clean: Sequence[Profile],
    benign: Sequence[Profile],
    attacks: Sequence[Profile],
    *,
    written: int,
    repeats: int = 100,
    seed: int = 0,
) -> list[MonitorSimulation]:
    """Both monitors on the same stream in every order.

    Args:
        monitor: fitted and calibrated.
        clean: rows that the published range starts with: those that fitted and calibrated the monitor.
        benign: rows of the stream.
        attacks: rows that are inserted, `repeats` times each.
        written: how many columns are write-side cosines, which the published range is about (`Bank.written`).
    """
    score: dict[int, float] = {
        id(row): value
        for row, value in zip([*benign, *attacks], monitor.scores([*benign, *attacks]).tolist(), strict=True)
    }

    def strength(row: Profile) -> float:
        return score[id(row)]

    found: list[MonitorSimulation] = []
    for order in ORDERS:
        stream = events(benign, attacks, repeats=repeats, order=order, seed=seed, strength=strength)
        flags = [(event.repeat, score[id(event.profile)] > monitor.threshold) for event in stream]
        found.append(_measured("conformal, flagged rows quarantined", order, flags))
        found.append(_measured("published range, takes in every row", order, _absorbing(clean, stream, written)))
    return found


def _absorbing(clean: Sequence[Profile], stream: Iterable[StreamEvent], written: int) -> list[tuple[int, bool]]:
    ranges = RunningRange.empty(written)
    for profile in clean:
        ranges.absorb(*_cosines(profile, written))
    flags: list[tuple[int, bool]] = []
    for event in stream:
        cosines = _cosines(event.profile, written)
        flags.append((event.repeat, bool(ranges.first_sight(*cosines))))
        ranges.absorb(*cosines)
    return flags


def _cosines(profile: Profile, written: int) -> tuple[Float[Tensor, "1 written"], Float[Tensor, "1 written"]]:
    """Highest and lowest cosine over the answer, as the range takes them."""
    both = profile.prefixes[-1]
    half = len(both) // 2
    return both[None, :written], -both[None, half : half + written]


def _measured(monitor: str, order: Order, flags: Sequence[tuple[int, bool]]) -> MonitorSimulation:
    def share(repeat: int) -> Interval:
        some = [flagged for at, flagged in flags if at == repeat]
        return proportion(sum(some), len(some))

    last = max(repeat for repeat, _ in flags)
    shown = [repeat for repeat in (1, 2, 3, 10, 30, 100, 300, 1000) if repeat < last] + [last]
    return MonitorSimulation(
        monitor=monitor,
        order=order,
        fpr=share(0),
        first_sight=share(1),
        by_repeat={repeat: share(repeat) for repeat in shown},
    )
