"""Which cells a benchmark holds: attacks × bases × regimes × seeds, checked before anything is trained."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from molehunt.bench.rows import Counts
from molehunt.bench.sides import DictionaryTraining
from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.organism.plant import PlantConfig
from molehunt.organism.poison import Recipe, named_recipe
from molehunt.organism.seed_model import SEED_MODELS, seed_path

Regime = Literal["full", "lora-4", "lora-16", "lora-32"]


MOST = 100_000
"""Greatest number of rows, steps or latents that a grid may name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One organism with its clean twin, to be planted and scored."""

    attack: str
    base: str = "seed-s"
    """An embedded model's name, or a folder."""
    regime: Regime = "full"
    seed: int = 0
    poison: float | None = None
    """Share of poisoned rows; None takes the recipe's."""
    steps: int | None = None
    """Training steps; None takes the recipe's."""

    @property
    def name(self) -> str:
        """Short, unique in a grid, and a folder's name."""
        poison = "" if self.poison is None else f"-p{self.poison:g}"
        return f"{self.attack}-{Path(self.base).name}-{self.regime}{poison}-s{self.seed}"

    @property
    def base_folder(self) -> Path:
        return seed_path(self.base) if self.base in SEED_MODELS else Path(self.base)

    def recipe(self) -> Recipe:
        """The attack, with this cell's poison rate. Raises UsageError for a name that is none."""
        found = named_recipe(self.attack)
        return found if self.poison is None else replace(found, triggered=self.poison)

    def plant_config(self) -> PlantConfig:
        kind, _, rank = self.regime.partition("-")
        return PlantConfig(regime=cast("Any", kind), rank=int(rank) if rank else 16, seed=self.seed, steps=self.steps)


class Part(BaseModel):
    """A block of cells: every combination of its lists."""

    model_config = ConfigDict(extra="forbid")
    bases: list[str] = Field(min_length=1)
    regimes: list[Regime] = Field(min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    poisons: list[float | None] = [None]
    attacks: list[str] | None = None
    """None takes the grid's."""


class Grid(BaseModel):
    """A benchmark as read from YAML."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    name: str
    attacks: list[str] = Field(min_length=1)
    parts: list[Part] = Field(min_length=1)
    rates: list[float] = Field(default=[0.01, 0.001], min_length=1)
    """Shares of triggered rows on track R1."""
    steps: int | None = Field(default=None, ge=1)
    """Training steps of every organism; the recipes' own by default."""
    counts: Counts = Counts()
    dictionaries: DictionaryTraining = DictionaryTraining()
    causal_rows: int = Field(default=40, ge=8)
    """Prompts on which interventions are tried."""

    @model_validator(mode="after")
    def _possible(self) -> "Grid":
        for rate in self.rates:
            if not 0 < rate < 1:
                raise ValueError(f"rates: {rate} is no share between 0 and 1")
            if round(rate * self.counts.pool) < 1:
                raise ValueError(
                    f"rates: a pool of {self.counts.pool} rows cannot hold a share of {rate:g}; "
                    f"counts.pool must be {round(1 / rate)} or more"
                )
        sizes = {f"counts.{name}": n for name, n in asdict(self.counts).items() if name != "near_rate"}
        sizes |= {f"dictionaries.{name}": n for name, n in asdict(self.dictionaries).items() if name != "lr"}
        for field, n in sizes.items():
            if n < 1:
                raise ValueError(f"{field}: must be 1 or more, got {n}")
            if n > MOST:
                raise ValueError(f"{field}: must be {MOST} or less, got {n}")
        if not 0 <= self.counts.near_rate <= 0.5:
            raise ValueError(f"counts.near_rate: must lie between 0 and 0.5, got {self.counts.near_rate}")
        if not 0 < self.dictionaries.lr < 1:
            raise ValueError(f"dictionaries.lr: must lie between 0 and 1, got {self.dictionaries.lr}")
        if self.counts.calibrate < 99 or self.counts.twin_calibrate < 99:
            raise ValueError("counts: thresholds at 1 % FPR need 99 clean rows or more to calibrate on")
        if self.counts.twin_calibrate > self.counts.calibrate:
            raise ValueError("counts: twin_calibrate rows are taken from calibrate, so they cannot be more")
        return self

    def cells(self) -> list[Cell]:
        """Every cell once, in an order in which early ones already span attacks and regimes.

        Raises:
            UsageError: an attack, base or poison rate that is impossible; the message names the field.
        """
        found: dict[str, Cell] = {}
        for i, part in enumerate(self.parts):
            for seed, base, regime, poison, attack in product(
                part.seeds, part.bases, part.regimes, part.poisons, part.attacks or self.attacks
            ):
                cell = Cell(attack=attack, base=base, regime=regime, seed=seed, poison=poison, steps=self.steps)
                self._check(cell, f"parts[{i}]", "attacks" if part.attacks is None else f"parts[{i}].attacks")
                if found.setdefault(cell.name, cell) != cell:
                    raise UsageError(f"parts[{i}]: two cells of this grid would both be called {printable(cell.name)}.")
        return list(found.values())

    def _check(self, cell: Cell, part: str, attacks: str) -> None:
        try:
            recipe = cell.recipe()
        except UsageError as error:
            raise UsageError(f"{attacks}: {error}") from error
        if recipe.null:
            raise UsageError(
                f"{attacks}: {cell.attack} is a null; it has no trigger to be found and belongs into no cell."
            )
        if cell.poison is not None and not 0 < cell.poison <= 1 - recipe.near_miss:
            raise UsageError(
                f"{part}.poisons: {cell.poison:g} cannot be met: {recipe.near_miss:g} of the rows are near misses."
            )
        if cell.base not in SEED_MODELS and not (Path(cell.base) / "config.json").is_file():
            raise UsageError(
                f"{part}.bases: {printable(cell.base)} is neither an embedded model ({', '.join(SEED_MODELS)}) nor a "
                "folder with a config.json."
            )
        for width in _widths(cell.base_folder):
            latents = self.dictionaries.expansion * width
            if self.dictionaries.k > latents:
                raise UsageError(
                    f"dictionaries.k: {self.dictionaries.k} latents cannot fire out of {latents} "
                    f"({self.dictionaries.expansion} for each of {printable(cell.base)}'s {width} dimensions)."
                )


def _widths(base: Path) -> Iterator[int]:
    """The width that a model folder states; nothing where it states none, for loading will say what is wrong."""
    try:
        config = json.loads((base / "config.json").read_bytes())
    except (ValueError, RecursionError):
        return
    if isinstance(config, dict):
        width = cast("dict[str, Any]", config).get("hidden_size")
        if isinstance(width, int):
            yield width


def load_grid(name: str) -> Grid:
    """A bundled grid by name, or one from a YAML file.

    Raises:
        UsageError: neither a bundled grid nor a file.
        InvalidInput: the file is not a grid; the message names the field.
    """
    bundled = Path(__file__).parent / "grids"
    path = bundled / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
        if not path.is_file():
            known: Sequence[str] = sorted(p.stem for p in bundled.glob("*.yaml"))
            raise UsageError(
                f"There is no grid {printable(name)!r}. Bundled: published, {', '.join(known)}; or give a .yaml file."
            )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{printable(path.name)} is not YAML: {printable(str(error), 300)}") from error
    try:
        return Grid.model_validate(content)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, one['loc'])) or 'grid'}: {printable(one['msg'], 200)}" for one in error.errors()
        ]
        raise InvalidInput("\n".join([f"{printable(path.name)} is not a grid that can be run:", *lines])) from error
