"""`python -m experiments TOPIC` measures what is missing and writes the topic's page; without a topic it lists them."""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from experiments.catalog import CATALOG
from experiments.records import append_record, read_records
from experiments.setting import Setting
from molehunt.errors import MolehuntError, UsageError

PAGES = Path("docs/results")


@runtime_checkable
class Measure(Protocol):
    """What `measure.py` of every topic has."""

    runs: Callable[[Setting], Sequence[str]]
    """The names of all runs, in the order of the page."""
    measure: Callable[[str, Setting], dict[str, Any]]
    """What one run finds, ready for JSON."""


@runtime_checkable
class Table(Protocol):
    """What `table.py` of every topic has."""

    table: Callable[[Mapping[str, dict[str, Any]], Setting], str]
    """The page, from what is done, by name."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.topic is None:
        for name, topic in CATALOG.items():
            print(f"{name:20} {topic.question}")
        return 0
    out = options.out or Path("runs/quick" if options.quick else "runs")
    setting = Setting(
        topic=options.topic, quick=options.quick, out=out, bench=options.bench or out / "bench", data=options.data
    )
    try:
        if options.one is not None:
            measure_one(options.one, setting)
            return 0
        if not options.table:
            for topic in (*CATALOG[options.topic].needs, options.topic):
                only = options.only if topic == options.topic else None
                measure_missing(replace(setting, topic=topic), only, options.workers)
        page = options.page or (out if options.quick or options.out else PAGES) / CATALOG[options.topic].page
        failed = write_page(setting, page)
    except MolehuntError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as failed:
        print(f"One run failed. What is done is kept in {setting.records}; the same command goes on.", file=sys.stderr)
        return failed.returncode
    for one in failed:
        print(one, file=sys.stderr)
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    found.add_argument("topic", nargs="?", choices=CATALOG, help="what to measure; without it, the topics are listed")
    found.add_argument("--quick", action="store_true", help="take the smallest size: about a minute on two cores")
    found.add_argument(
        "--out", type=Path, help="folder of the records and, with this option, of the page (default runs)"
    )
    found.add_argument(
        "--bench", type=Path, help="folder of the planted organisms (default: bench in the other folder)"
    )
    found.add_argument("--data", type=Path, help="folder of public texts that some topics read")
    found.add_argument(
        "--page", type=Path, help="file of the page (default: in docs/results, or in the folder of --out)"
    )
    found.add_argument("--only", help="measure only runs with this text in their name")
    found.add_argument("--workers", type=int, default=2, help="number of runs at a time, each in a process of its own")
    found.add_argument("--table", action="store_true", help="only write the page from what is done")
    found.add_argument("--one", help=argparse.SUPPRESS)  # what a worker is started with
    return found


def measure_missing(setting: Setting, only: str | None, workers: int) -> None:
    """Measure each run that has no record, in processes of one thread; a quick run is measured in this process."""
    done = read_records(setting.records)
    names = [name for name in _measure(setting).runs(setting) if name not in done and (not only or only in name)]
    if setting.quick:
        for name in names:
            measure_one(name, setting)
        return

    def work(name: str) -> None:
        command = [sys.executable, "-m", "experiments", setting.topic, "--one", name]
        command += ["--out", str(setting.out), "--bench", str(setting.bench)]
        command += ["--data", str(setting.data)] if setting.data is not None else []
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        print(f"{setting.topic}: {name}", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, names))


def measure_one(name: str, setting: Setting) -> None:
    import torch

    if not setting.quick:
        torch.set_num_threads(1)  # so that numbers do not depend on how many runs there are at a time
    append_record(setting.records, name, _measure(setting).measure(name, setting))


def write_page(setting: Setting, page: Path) -> list[str]:
    """Write the page, and return what its topic counts as failures, if it has a function `failures`."""
    done = read_records(setting.records)
    ordered = {name: done[name] for name in _measure(setting).runs(setting) if name in done}
    if not ordered:
        raise UsageError(f"{setting.records} has no run of {setting.topic} yet. Start without --table.")
    writer = cast("Table", importlib.import_module(f"{CATALOG[setting.topic].package}.table"))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(writer.table(ordered, setting), encoding="utf-8")
    print(page)
    count: Callable[[Mapping[str, dict[str, Any]]], list[str]] = getattr(writer, "failures", lambda found: [])
    return count(ordered)


def _measure(setting: Setting) -> Measure:
    return cast("Measure", importlib.import_module(f"{CATALOG[setting.topic].package}.measure"))


if __name__ == "__main__":
    sys.exit(main())
