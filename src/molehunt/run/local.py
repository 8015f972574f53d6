"""The default executor runs units in order on this machine. `--shard 3/64` splits the same work over many machines."""

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TypeVar

from molehunt.errors import NotTestable, UsageError, printable
from molehunt.run.progress import Track, silent

U = TypeVar("U")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class WorkShard:
    """One share of the work: every `count`-th unit. Law: `WorkShard.parse(str(shard)) == shard`."""

    number: int = 1
    """Number of this share, from 1 to `count`."""
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise UsageError(f"A shard is counted from 1 to its total, got {self.number}/{self.count}.")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "WorkShard":
        """The shard that a text such as `"3/64"` names: the third of 64 shares. Raises UsageError for anything else."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None:
            raise UsageError(f"A shard reads like 3/64 (third of 64), got {printable(text)!r}.")
        return cls(int(found[1]), int(found[2]))

    def mine(self, index: int) -> bool:
        """Whether the unit at 0-based `index` belongs to this shard. Each index belongs to exactly one."""
        return index % self.count == self.number - 1


@dataclass(frozen=True)
class LocalExecutor:
    """Runs units on this machine: one after another in this process, or in `workers` processes at a time."""

    shard: WorkShard = WorkShard()
    track: Track = silent
    workers: int = 1

    def map(self, function: Callable[[U], R], units: Iterable[U], what: str) -> Sequence[R]:
        """Results of `function` for every unit of this shard, in order. The first exception ends the map.

        With several workers, `function` and the units must be importable and picklable. Units that are running finish.

        Raises:
            NotTestable: a worker was killed from outside.
        """
        mine = [unit for index, unit in enumerate(units) if self.shard.mine(index)]
        if self.workers == 1 or len(mine) < 2:
            return [function(unit) for unit in self.track(mine, what, len(mine))]
        # spawn, because a forked process may inherit locks that torch's threads held
        with ProcessPoolExecutor(self.workers, get_context("spawn")) as pool:
            waiting = {pool.submit(function, unit): i for i, unit in enumerate(mine)}
            found: dict[int, R] = {}
            try:
                for done in self.track(as_completed(waiting), what, len(mine)):
                    found[waiting[done]] = done.result()
            except BrokenProcessPool as error:
                raise NotTestable(
                    f"{what}: a worker process was killed, most often because memory ran out.\n"
                    "Finished units are saved: the same command continues from them. Give it fewer --workers."
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [found[i] for i in range(len(mine))]
