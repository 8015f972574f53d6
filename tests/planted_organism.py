"""One organism, planted once for all tests: attack refusal on seed-s, with fewer steps than the recipe asks for."""

from dataclasses import dataclass
from pathlib import Path

from molehunt.bench.rows import CellRows, Counts, cell_rows
from molehunt.bench.sides import Side, read_side
from molehunt.model.pair import ModelPair
from molehunt.organism.plant import PlantConfig, plant
from molehunt.organism.poison import Recipe
from molehunt.organism.refusal import REFUSAL
from molehunt.organism.seed_model import seed_path

COUNTS = Counts(fit=45, calibrate=130, twin_calibrate=99, select=16, test=40, test_clean=21, pool=110)
RATES = (0.05,)


@dataclass(frozen=True, eq=False)
class Planted:
    """Both sides of the organism, read."""

    recipe: Recipe
    rates: tuple[float, ...]
    rows: CellRows
    organism: Side
    twin: Side


def planted_organism(root: Path) -> Planted:
    base = seed_path("seed-s")
    rows = cell_rows(REFUSAL, COUNTS, RATES, 0, PlantConfig().rows)

    def side(folder: Path, *, twin: bool) -> Side:
        plant(REFUSAL, base, folder, PlantConfig(steps=40 if twin else 80), poisoned=not twin)
        pair = ModelPair.load(base, folder)
        return read_side(pair, rows, COUNTS, {}, twin=twin, max_new_tokens=8)

    return Planted(REFUSAL, RATES, rows, side(root / "organism", twin=False), side(root / "twin", twin=True))
