"""One line of the benchmark table."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

CLOCK = "MOLEHUNT_BENCH_CLOCK"
"""Environment variable; `cpu` counts the process's own seconds, on a machine that has other work."""


@dataclass(frozen=True, kw_only=True)
class Row:
    work: str
    against: str
    ours: str
    theirs: str
    ratio: float | None
    """theirs / ours: above 1 is in our favour. None where nothing was measured."""
    aim: str
    met: bool | None
    """None where there is no aim or nothing was measured."""
    note: str = ""


def now(device: str = "cpu") -> float:
    """Seconds on the chosen clock; on a GPU, after its work is done."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if os.environ.get(CLOCK) == "cpu" else time.perf_counter()


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Fastest of some runs: what the machine can do when nothing is in its way."""
    taken: list[float] = []
    for _ in range(repeats):
        start = now()
        work()
        taken.append(now() - start)
    return min(taken)


def shown(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


HEADER = "| work | against | ours | theirs | ratio | aim | met | note |\n|---|---|---|---|---|---|---|---|"


def line(row: Row) -> str:
    """A line of the Markdown table under `HEADER`."""
    ratio = "–" if row.ratio is None else f"{row.ratio:.3g}×"
    met = {True: "yes", False: "**no**", None: "–"}[row.met]
    cells = (row.work, row.against, row.ours, row.theirs, ratio, row.aim, met, row.note)
    return f"| {' | '.join(cells)} |"
