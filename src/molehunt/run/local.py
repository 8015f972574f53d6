"""The default executor: one process, in order. `--shard 3/64` splits the same work over many machines."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from molehunt.errors import UsageError, printable
from molehunt.run.progress import Track, silent

U = TypeVar("U")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Shard:
    """One share of the work: every `count`-th unit. Law: `Shard.parse(str(shard)) == shard`."""

    number: int = 1
    """From 1 to `count`."""
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise UsageError(f"A shard is counted from 1 to its total, got {self.number}/{self.count}.")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`"3/64"` → the third of 64 shares. Raises UsageError for anything else."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None:
            raise UsageError(f"A shard reads like 3/64 (third of 64), got {printable(text)!r}.")
        return cls(int(found[1]), int(found[2]))

    def mine(self, index: int) -> bool:
        """Whether the unit at 0-based `index` belongs to this shard. Each index belongs to exactly one."""
        return index % self.count == self.number - 1


@dataclass(frozen=True)
class LocalExecutor:
    """Runs units one after another in this process."""

    shard: Shard = Shard()
    track: Track = silent

    def map(self, function: Callable[[U], R], units: Iterable[U], what: str) -> Sequence[R]:
        """`function` of every unit of this shard, in order. The first exception ends the map."""
        mine = [unit for index, unit in enumerate(units) if self.shard.mine(index)]
        return [function(unit) for unit in self.track(mine, what, len(mine))]
