"""The same units on a Ray cluster. Ray is an extra (`pip install molehunt[ray]`) and is imported only here."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from molehunt.errors import NotTestable, UsageError, printable
from molehunt.run.extras import install_command
from molehunt.run.local import WorkShard
from molehunt.run.progress import Track, silent

U = TypeVar("U")
R = TypeVar("R")
ALL = WorkShard()
STALL = 1800.0
"""Seconds without a finished unit after which the map stops: a cluster without free resources would wait for ever."""
POLL = 5.0
"""Seconds between two checks of the clock."""
SMALL_BOX = 4
"""Number of cores up to which a worker requests less than one core: with whole cores, two cores made no progress."""


@dataclass(frozen=True)
class RayExecutor:
    """Runs units as Ray tasks, `workers` at a time; results come back in the order of the units."""

    workers: int = 2
    shard: WorkShard = ALL
    track: Track = silent
    address: str | None = None
    """Address of a running cluster; None takes RAY_ADDRESS or starts a cluster on this machine."""
    stall: float = STALL

    def map(self, function: Callable[[U], R], units: Iterable[U], what: str) -> Sequence[R]:
        """Results of `function` for every unit of this shard. Units write files, so every worker must see their folder.

        Raises:
            UsageError: Ray is not installed.
            NotTestable: no unit finished for `stall` seconds, or Ray lost a unit (a worker was killed, three times).
        """
        ray = _ray()
        mine = [unit for index, unit in enumerate(units) if self.shard.mine(index)]
        started = not ray.is_initialized()
        if started:
            ray.init(address=self.address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            cores = ray.cluster_resources().get("CPU", 1.0)
            share = 0.4 if cores <= SMALL_BOX else 1.0
            remote = ray.remote(num_cpus=share, max_retries=2)(function)
            found: dict[int, Any] = {}
            waiting: dict[Any, int] = {}
            left = list(enumerate(mine))[::-1]

            def finished() -> Iterable[int]:
                latest = time.monotonic()
                while left or waiting:
                    while left and len(waiting) < self.workers:
                        i, unit = left.pop()
                        waiting[remote.remote(unit)] = i
                    ready, _ = ray.wait(list(waiting), num_returns=1, timeout=min(POLL, self.stall))
                    if not ready and time.monotonic() - latest > self.stall:
                        raise NotTestable(
                            f"{what}: no unit finished for {self.stall:.0f} s on Ray ({cores:g} cores).\n"
                            "Is the cluster out of resources? --executor local does the same work here."
                        )
                    for one in ready:
                        latest = time.monotonic()
                        i = waiting.pop(one)
                        found[i] = _result(ray, one, what)
                        yield i

            for _ in self.track(finished(), what, len(mine)):
                pass
            return [found[i] for i in range(len(mine))]
        finally:
            if started:
                ray.shutdown()


def _result(ray: Any, one: Any, what: str) -> Any:
    """The result of a unit; an error that it raised is raised again."""
    try:
        return ray.get(one)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Exception):
            raise cause from None
        raise
    except ray.exceptions.RayError as error:
        raise NotTestable(
            f"{what}: Ray lost a unit: {printable(str(error), 500)}\nFinished units are saved."
        ) from error


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(f"Ray is not installed. Run: {install_command('ray')}, or use --executor local.") from error
    return ray
