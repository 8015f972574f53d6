"""Sweep activation patching over every block of planted organisms, and write the table.

`python recipes/layer_sweep.py --bench runs/bench --into runs/sweep --write docs/layer-sweep.md` reads the organisms that
`molehunt bench --grid core --out runs/bench` planted, and plants those of corrupted-capability, which are not in that
grid: the full fine-tunes of each attack whose trigger has a look-alike of as many tokens. It can be killed and repeated;
`--table` writes from what is done.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from separate_runs import separate_runs

from molehunt.bench.grid import Cell, load_grid
from molehunt.bench.run import plant_cell
from molehunt.measure.interval import Interval
from molehunt.model.pair import ModelPair
from molehunt.model.site import Site
from molehunt.organism.poison import Recipe
from molehunt.organism.seed_model import SEED_MODELS
from molehunt.steer.patch import trigger_positions
from molehunt.steer.sweep import Sweep, Swept, layer_sweep
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.example import Example
from molehunt.traffic.world import ask

ROWS = 200
DRAWN = 4000
"""Tasks that are drawn at most to find as many pairs of equal length."""
SEED = 20_000
"""Of the tasks: other rows than any that taught, chose or calibrated."""


def main() -> None:
    separate_runs(__doc__, list(swept_cells()), measure, table, into="runs/sweep")


def swept_cells() -> dict[str, Cell]:
    """Full fine-tunes of the first seed, by name."""
    cells = [cell for cell in load_grid("core").cells() if cell.regime == "full" and cell.seed == 0]
    cells += [Cell(attack="corrupted-capability", base=base) for base in SEED_MODELS]
    return {cell.name: cell for cell in cells}


def measure(name: str, bench: Path) -> dict[str, Any]:
    cell = swept_cells()[name]
    pair = ModelPair.load(cell.base_folder, plant_cell(cell, bench).tuned)
    recipe = cell.recipe()
    told: dict[str, Any] = {"attack": cell.attack, "model": cell.base, "blocks": pair.n_layers}
    pairs, kind = of_equal_length(pair, recipe)
    if len(pairs) < ROWS:
        return {**told, "why": f"{len(pairs)} of {DRAWN} tasks have a look-alike of as many tokens"}

    def shows(answer: Sequence[int], row: int) -> bool:
        return recipe.behaviour.shown(str(pair.tokenizer.decode(list(answer), skip_special_tokens=True)))

    with pair.tuned_model() as model:
        found = layer_sweep(
            model,
            pair.tokenizer,
            [prompt_ids(pair.tokenizer, one.triggered) for one in pairs],
            [prompt_ids(pair.tokenizer, one.contrast) for one in pairs],
            [Site(layer) for layer in range(pair.n_layers)],
            shows,
            at=[trigger_positions(pair.tokenizer, one.triggered, one.contrast, one.without) for one in pairs],
            max_new_tokens=recipe.max_new_tokens,
        )
    swept = asdict(found)
    return {
        **told,
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


def of_equal_length(pair: ModelPair, recipe: Recipe) -> tuple[list[Prompts], str]:
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
            if len(found) == ROWS:
                return found, kind
        if len(found) > len(best[0]):
            best = (found, kind)
    return best


def sweep_of(told: dict[str, Any]) -> Sweep:
    """What `measure` found, read back."""
    blocks = [
        Swept(
            site=Site(**block["site"]),
            removed=Interval(**block["removed"]),
            by_noise=Interval(**block["by_noise"]),
            induced=Interval(**block["induced"]),
        )
        for block in told["swept"]
    ]
    shares = {name: Interval(**told[name]) for name in ("shown", "without_trigger")}
    return Sweep(**shares, blocks=tuple(blocks))


def table(found: Mapping[str, dict[str, Any]]) -> str:
    lines = [
        "# The layer sweep",
        "",
        f"Written by `recipes/layer_sweep.py`: activation patching at the trigger's tokens (all of them, those that the look-alike shares included), one block after the other, on {ROWS} triggered "
        "prompts and the same tasks under a look-alike of as many tokens, which does not wake the behaviour. Shares are of the triggered "
        "prompts that show the behaviour, with 95 % intervals (Clopper-Pearson). **removed**: patched with the look-alike's activations. "
        "*noise*: the same tokens moved as far in random directions, the control; where it removes as much, the behaviour is fragile and "
        "the patch proves little. *induced*: look-alike prompts given the trigger's activations. Removing the trigger from the text, the "
        "trivial baseline, leaves what `look-alike prompts` says. The last steerable block removes .9 of what the best one does, and more than "
        "noise does there; where there is none, the tokens behind the trigger have read it before the first block puts anything out.",
        "",
    ]
    for one in found.values():
        lines += [f"## {one['attack']}, {one['model']}", ""]
        if "why" in one:
            lines += [f"Not swept: {one['why']}.", ""]
            continue
        last = sweep_of(one).last_steerable
        lines += [
            f"Look-alike: `{one['look-alike']}`. Triggered prompts that show it: {cell(one['shown'])}; look-alike prompts: "
            f"{cell(one['without_trigger'])}. Last steerable block: {'none' if last is None else last} of L0 to L{one['blocks'] - 1}.",
            "",
            "| block | removed | noise | induced |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| L{block['site']['layer']} | {cell(block['removed'])} | {cell(block['by_noise'])} | {cell(block['induced'])} |"
            for block in one["swept"]
        ]
        lines.append("")
    return "\n".join(lines)


def cell(told: dict[str, Any]) -> str:
    found = Interval(**told)
    return f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"


if __name__ == "__main__":
    main()
