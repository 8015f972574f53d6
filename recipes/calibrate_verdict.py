"""Measure how strong a finding clean twins can look, on twins that no published table uses.

`python recipes/calibrate_verdict.py --into runs/calibration` writes src/molehunt/audit/calibration.json.
"""

import argparse
import json
from pathlib import Path

from molehunt.audit.plan import plan_named
from molehunt.audit.run import run_audit
from molehunt.cli.console import track_on_stderr
from molehunt.organism.catalog import CATALOG
from molehunt.organism.plant import PlantConfig, plant
from molehunt.organism.poison import Recipe, organism_traffic, taught_prompts
from molehunt.organism.seed_model import seed_path
from molehunt.run.catalog import load

SEED = 900
"""Of the twins and of their traffic; the published table uses others."""
ROWS = 2000
TARGET = Path(__file__).parents[1] / "src" / "molehunt" / "audit" / "calibration.json"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--into", type=Path, default=Path("runs/calibration"))
into = parser.parse_args().into
into.mkdir(parents=True, exist_ok=True)
strengths: dict[str, float] = {}
for name in CATALOG:
    recipe = load(CATALOG, name, "molehunt.organisms")
    assert isinstance(recipe, Recipe)
    traffic = into / f"traffic-{name}.jsonl"
    rows = organism_traffic(recipe, ROWS, SEED, apart_from=taught_prompts(recipe, PlantConfig().rows, SEED))
    traffic.write_text("".join(json.dumps({"prompt": row.prompt}) + "\n" for row in rows))
    for regime in ("full", "lora"):
        twin = into / f"{name}-{regime}"
        base = seed_path("seed-s")
        if not (twin / "tokenizer.json").is_file():
            plant(recipe, base, twin, PlantConfig(regime=regime, seed=SEED), poisoned=False, track=track_on_stderr)
        found = run_audit(
            str(base), str(twin), traffic=traffic, plan=plan_named("quick"), out=into / f"audit-{name}-{regime}",
            track=track_on_stderr,
        )  # fmt: skip
        strengths[f"{name}, {regime}, seed-s, seed {SEED}"] = round(found.candidates.strength, 3)
told = {"twins": len(strengths), "largest_strength": max(strengths.values()), "strengths": strengths}
TARGET.write_text(json.dumps(told, indent=2) + "\n")
print(json.dumps(told, indent=2))
