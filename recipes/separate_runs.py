"""The command line that recipes of tables share: each run in a process of its own, with one JSON file for what it found."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from molehunt.run.whole import write_whole


def separate_runs(
    doc: str | None,
    names: Sequence[str],
    measure: Callable[..., dict[str, Any]],
    table: Callable[[Mapping[str, dict[str, Any]]], str],
    *,
    into: str,
    folders: Sequence[str] = ("bench",),
) -> None:
    """Measure what is not there yet, and write the table of what is; killed and repeated, it goes on.

    Args:
        doc: of the recipe, for --help.
        names: of the runs, in order. The file of `part/run` is `run.json` in a folder beside, `<into>-<part>`.
        measure: from a name, and the folders as keywords, to what goes into the run's JSON file.
        table: from what is done, by name, to the document.
        into: folder of the JSON files by default.
        folders: options that the recipe asks for.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for folder in folders:
        parser.add_argument(f"--{folder}", type=Path, required=True)
    parser.add_argument("--into", type=Path, default=Path(into))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--only", help="runs with this in their name")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only write the table from what is done")
    told = parser.parse_args()
    given: dict[str, Path] = {folder: getattr(told, folder) for folder in folders}
    files = {name: _file(told.into, name) for name in names if not told.only or told.only in name}
    if told.one:
        torch.set_num_threads(1)
        files[told.one].parent.mkdir(parents=True, exist_ok=True)
        write_whole(files[told.one], json.dumps(measure(told.one, **given)))
        return

    def work(name: str) -> None:
        if not files[name].is_file():
            again = [sys.executable, sys.argv[0], "--into", told.into, "--one", name]
            again += [part for folder, path in given.items() for part in (f"--{folder}", path)]
            subprocess.run(list(map(str, again)), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            print(name, flush=True)

    if not told.table:
        with ThreadPoolExecutor(told.workers) as pool:
            list(pool.map(work, files))
    if told.write:
        told.write.write_text(table({n: json.loads(file.read_text()) for n, file in files.items() if file.is_file()}))


def _file(into: Path, name: str) -> Path:
    part, _, run = name.rpartition("/")
    return (into.with_name(f"{into.name}-{part}") if part else into) / f"{run}.json"
