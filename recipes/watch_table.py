"""Measure the watch on every organism of the core grid and its clean twin, and write the tables.

`python recipes/watch_table.py --bench runs/bench --into runs/watch --write docs/watch-table.md --seen FIT.jsonl TEST.jsonl
--unseen TEST.jsonl` reads the organisms that `molehunt bench --grid core --out runs/bench` planted. It can be killed and
repeated; `--only` does a part and `--table` writes the tables from what is done. Logs have `{"prompt": …}` a line; of a
domain given with `--seen`, rows of the first are in the calibration, and nothing of one given with `--unseen` is.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import torch
from watch_read import Read, cut, join, of_changes, read_rows
from watch_scored import RATES, Parts, calm, contaminated, flagged, repeated, settings
from watch_told import tables

from molehunt.bench.grid import Cell, load_grid
from molehunt.bench.rows import Counts, cell_rows
from molehunt.bench.run import planted_cell
from molehunt.model.pair import ModelPair
from molehunt.run.whole import write_whole
from molehunt.traffic.example import Example
from molehunt.traffic.stream import read_conversations

COUNTS = Counts(fit=320, calibrate=1080, test_clean=500, test=200, select=1, pool=50)
"""Rows of the organism's own world; 320 fit the score, 1,080 set the threshold."""
LONG_FIT, LONG_TEST = 500, 150
SEEN_FIT, SEEN_TEST = 500, 200
UNSEEN_TEST = 250
JOINED = (2, 3, 4, 5, 6)
"""Prompts that a long input is made of; those that test are of six."""
FIT_FOREIGN = 120
"""Of the long rows, and of those of each domain: those that fit the score."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--seen", type=Path, nargs=2, action="append", default=[])
    parser.add_argument("--unseen", type=Path, action="append", default=[])
    parser.add_argument("--only", help="cells with this in their name")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a worker does
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only write the tables from what is done")
    parser.add_argument("--write", type=Path)
    told = parser.parse_args()
    told.into.mkdir(parents=True, exist_ok=True)
    cells = {cell.name: cell for cell in load_grid("core").cells() if not told.only or told.only in cell.name}
    if told.one:
        torch.set_num_threads(1)
        measure(cells[told.one], told.bench, told.into, told.seen, told.unseen)
        return

    def work(name: str) -> None:
        if not (told.into / f"{name}.json").is_file():
            again = [sys.executable, __file__, "--bench", told.bench, "--into", told.into, "--one", name]
            again += [part for pair in told.seen for part in ("--seen", *pair)]
            again += [part for file in told.unseen for part in ("--unseen", file)]
            subprocess.run([str(part) for part in again], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            print(name, flush=True)

    if not told.table:
        with ThreadPoolExecutor(told.workers) as pool:
            list(pool.map(work, sorted(cells, key=lambda name: cells[name].seed)))
    if told.write:
        found = [
            json.loads((told.into / f"{n}.json").read_text()) for n in cells if (told.into / f"{n}.json").is_file()
        ]
        told.write.write_text(tables(found, len(cells)))


def measure(cell: Cell, bench: Path, into: Path, seen: Sequence[Sequence[Path]], unseen: Sequence[Path]) -> None:
    organism = planted_cell(cell, bench)
    splits = dict(cell_rows(cell.recipe(), COUNTS, (0.02,), cell.seed, cell.plant_config().rows).splits)
    own: dict[str, Sequence[Example]] = {
        "fit": splits["fit.clean"],
        "calibrate": splits["calibrate.clean"],
        "clean": splits["test.clean"],
        "near": splits["test.near"],
        "triggered": splits["test.triggered"],
    }
    rows = dict(own)
    foreign = {"long": long_rows(splits["calibrate.clean"], LONG_FIT, JOINED)}
    rows["test long"] = long_rows(splits["test.clean"], LONG_TEST, JOINED[-1:])
    for first, test in seen:
        foreign[test.stem] = logged(first, SEEN_FIT)
        rows[f"test {test.stem}"] = logged(test, SEEN_TEST)
    for name, some in foreign.items():
        rows[f"fit {name}"], rows[f"calibrate {name}"] = some[:FIT_FOREIGN], some[FIT_FOREIGN:]
    for test in unseen:
        rows[f"unseen {test.stem}"] = logged(test, UNSEEN_TEST)
    found = {
        "cell": cell.name,
        "attack": cell.attack,
        "model": cell.base,
        "regime": cell.regime,
        "seed": cell.seed,
        "organism": side(cell, organism.tuned, rows, into / "reads" / cell.name / "organism", controls=True),
        "twin": side(cell, organism.twin, own, into / "reads" / cell.name / "twin", controls=False),
    }
    write_whole(into / f"{cell.name}.json", json.dumps(found))


def logged(log: Path, n: int) -> list[Example]:
    return [
        Example(prompt=row.turns[-1].text, tag=log.stem)
        for row, _ in zip(read_conversations(log), range(n), strict=False)
    ]


def long_rows(clean: Sequence[Example], n: int, joined: Sequence[int]) -> list[Example]:
    rng = Random(len(joined))
    return [
        Example(prompt="\n\n".join(e.prompt for e in rng.sample(list(clean), joined[i % len(joined)])), tag="long")
        for i in range(n)
    ]


def side(
    cell: Cell, folder: Path, rows: Mapping[str, Sequence[Example]], kept: Path, *, controls: bool
) -> dict[str, Any]:
    """How many of each kind of row each score flags, in each setting, at each rate. What was read is kept."""
    pair = ModelPair.load(cell.base_folder, folder).apart(cell.base_folder)
    banks = {"tail sum": of_changes(pair, shuffled=False)}
    if controls:
        banks |= {"random directions": banks["tail sum"].random(0), "shuffled ΔW": of_changes(pair, shuffled=True)}
    joined, columns = join(banks)
    kept.mkdir(parents=True, exist_ok=True)
    read: dict[str, Read] = {}
    for kind, examples in rows.items():
        file = kept / f"{kind}.safetensors"
        if not file.is_file():
            base = controls or kind in ("fit", "calibrate")  # what a calibration sets aside takes the base to see
            read_rows(pair, joined, columns["tail sum"], examples, base).save(file)
        read[kind] = Read.load(file)
    parts: Parts = {(bank, kind): cut(one.profiles, columns[bank]) for bank in columns for kind, one in read.items()}
    told: dict[str, Any] = {"n": {kind: len(one.profiles) for kind, one in read.items()}, "flagged": {}, "aside": {}}
    by_name = settings(list(rows), mixed=controls)
    for name, setting in by_name.items():
        for rate in RATES:
            for score, counts in flagged(read, parts, setting, rate, controls).items():
                told["flagged"][f"{score} | {name} | {rate:g}"] = counts
        usual = calm(read, parts, setting, RATES[0])
        clean = torch.cat([usual(kind) for kind in (*setting.fit, *setting.calibrate)])
        told["aside"][name] = {"n": int((~clean).sum()), "clean": len(clean), "usual": int(usual("clean").sum())}
    if controls:
        told["contaminated"] = contaminated(read, parts, RATES[0])
        usual = calm(read, parts, by_name["own"], RATES[0])
        told["repeated"] = repeated(read, parts, usual, RATES[0], banks["tail sum"].written)
    return told


if __name__ == "__main__":
    main()
