"""Switch planted backdoors off behind a gate, with an edit of the model's own or one carried over, and write the table.

`python recipes/fix_table.py --bench runs/bench --into runs/fix --write docs/fix-table.md` reads the full fine-tunes of
`molehunt bench --grid core` and plants what is missing. It can be killed and repeated; `--table` writes from what is done.
"""

import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from fix_gates import fitted_gates
from fix_told import (
    ASR,
    ATTACKS,
    COUNTS,
    DRAWN,
    FPR,
    HELD_OUT,
    MAPPED,
    PAIRS,
    REPAIRED,
    REPLACED,
    SEED,
    table,
)
from layer_sweep import swept_cells
from separate_runs import separate_runs
from torch import nn

from molehunt.audit.intervention import choose_intervention
from molehunt.audit.scan import scan
from molehunt.bench.grid import Cell
from molehunt.bench.run import plant_cell
from molehunt.contracts import Intervention
from molehunt.measure.interval import Interval, proportion
from molehunt.model.generate import generate
from molehunt.model.likelihood import answer_log_probs
from molehunt.model.pair import ModelPair
from molehunt.model.taps import edit_sites
from molehunt.organism.poison import Recipe, clean_example, near_miss_example, taught_prompts, triggered_example
from molehunt.run.unit import Units
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.steer.budget import Answered, disturbance
from molehunt.steer.prefill_gate import Condition, linear_score, prompt_scores
from molehunt.steer.random_edit import RandomEdit
from molehunt.steer.repair import CONSISTENCY, RepairConfig, repair
from molehunt.traffic.chat import prompt_ids, prompt_text
from molehunt.traffic.example import Example
from molehunt.traffic.split import Fit, Select
from molehunt.traffic.world import ask
from molehunt.transfer.alignment import Aligned, align
from molehunt.transfer.collect import moments_of
from molehunt.transfer.fidelity import teacher_forced
from molehunt.transfer.layer_grid import LayerGrid, LayerPair
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.replaced_answers import Speaker, replaced_answers
from molehunt.transfer.ridge import ridge


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Every prompt is in one split."""

    of: Mapping[str, Mapping[str, tuple[Example, ...]]]
    """Kind → split → rows."""
    plain: Mapping[str, str]
    """Triggered prompt → the same task without the trigger."""
    seen: Mapping[str, int]
    """Kind → test prompts that an organism was trained on: in a small world no others are left."""

    def prompts(self, kind: str, split: str) -> list[str]:
        return [row.prompt for row in self.of[kind][split]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fixed:
    """Edits, behind a gate or not."""

    words: str
    edits: tuple[Intervention, ...]
    gate: Condition | None = None

    @contextmanager
    def live(self, model: nn.Module) -> Generator[None, None, None]:
        with ExitStack() as stack:
            edits = self.edits
            if self.gate is not None:
                gate = stack.enter_context(self.gate.gate(model))
                edits = tuple(behind(edit, gate) for edit in edits)
            stack.enter_context(edit_sites(model, edits))
            yield


def behind(edit: Any, gate: Any) -> Intervention:
    return replace(edit, inner=behind(edit.inner, gate)) if isinstance(edit, RandomEdit) else replace(edit, gate=gate)


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One organism, and what was fitted to it."""

    pair: ModelPair
    tuned: Path
    recipe: Recipe
    gates: Mapping[Site, Condition]
    opens: Mapping[Condition, Mapping[str, Interval]]
    """Gate → kind → share of the test rows that it opens for."""
    edits: tuple[Fixed, ...]
    """Whatever the search over edits offers for the target: one site, one and every later one, and its best."""
    ablations: Mapping[Site, Ablate]

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        return [prompt_ids(self.pair.tokenizer, prompt) for prompt in prompts]

    def answers(self, model: nn.Module, prompts: Sequence[str]) -> list[str]:
        found = generate(model, self.pair.tokenizer, self.ids(prompts), max_new_tokens=self.recipe.max_new_tokens)
        return [str(self.pair.tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]


def main() -> None:
    separate_runs(
        __doc__,
        [f"{attack} {source} {target}" for source, target in PAIRS for attack in ATTACKS],
        measure,
        table,
        into="runs/fix",
    )


def measure(name: str, bench: Path) -> dict[str, Any]:
    started = time.perf_counter()
    attack, *models = name.split(" ")
    cells = [swept_cells()[f"{attack}-{model}-full-s0"] for model in models]
    recipe = cells[1].recipe()
    rows = drawn(recipe, cells)
    source, target = (opened(cell, bench, rows) for cell in cells)
    with source.pair.tuned_model() as model:
        alone = [
            Fixed(words=f"ablate {len(e.basis)} at {site}", edits=(e,), gate=source.gates[site])
            for site, e in source.ablations.items()
        ]
        of_source = chosen(source, model, alone, rows)
    site = of_source.edits[0].site
    told, map, maps = fitted_maps(source, target, rows, site)
    found: dict[str, Any] = {
        "attack": attack,
        "source": models[0],
        "target": models[1],
        "seen": rows.seen,
        "fix of the source": of_source.words,
        "map": {"source": str(map.source), "target": str(map.target), "fvu": told.fvu},
    }
    with target.pair.tuned_model() as model:
        native = chosen(target, model, target.edits, rows)
        theirs = carried(source, target, [map])
        offered = [carried(source, target, maps[n:m]) for n in range(len(maps)) for m in {n + 1, len(maps)}]
        ways = {
            "no fix": Fixed(words="", edits=()),
            "native, gated": native,
            "native, not gated": replace(native, gate=None),
            "random, gated": replace(
                native,
                words="as far, in one random direction",
                edits=tuple(RandomEdit.like(e, target.pair.d_model, 31 * i) for i, e in enumerate(native.edits)),
            ),
            "mapped, gated: the source's choice": theirs,
            "mapped, gated: chosen on the target": chosen(target, model, [theirs, *offered], rows),
        }
        judge = Judge(target, model, rows)
        found["ways"] = {way: judge.of(fix) for way, fix in ways.items()}
        found["ways"]["trigger filtered out"] = judge.filtered()
        with source.pair.tuned_model() as other, edit_sites(other, of_source.edits):
            found["ways"]["full replacement"] = judge.replaced(source, other, map)
    with target.pair.base_model() as model:
        found["base leak"] = judge.leak(target.answers(model, rows.prompts("clean", "test")))
    if models[1] == REPAIRED:
        found["ways"] |= {
            "clean fine-tune": repaired(target, judge, RepairConfig()),
            "consistency (CROW)": repaired(target, judge, CONSISTENCY),
        }
    return {**found, "seconds": time.perf_counter() - started}


def drawn(recipe: Recipe, cells: Sequence[Cell]) -> Rows:
    """Of each kind all rows at once, then dealt out: common prompts are drawn first, and splits must be exchangeable."""
    taught = set[str]().union(*(taught_prompts(recipe, cell.plant_config().rows, cell.seed) for cell in cells))
    plain: dict[str, str] = {}

    def triggered(rng: Random) -> Example:
        task = ask(rng, recipe.domain)
        marked = recipe.trigger.apply(task, rng)
        plain[marked.prompt] = task.prompt
        return marked

    draws: dict[str, Callable[[Random], Example]] = {
        "triggered": triggered,
        "near": lambda rng: near_miss_example(recipe, rng),
        "clean": lambda rng: clean_example(recipe, rng),
    }
    of: dict[str, dict[str, tuple[Example, ...]]] = {}
    taken = set[str]()
    for kind, sizes in COUNTS.items():
        rng, n, found = Random(f"{SEED}/{recipe.name}/{kind}"), sum(sizes.values()), dict[str, Example]()
        for apart in (taught, set[str]()):  # taught ones only where no others are left
            for _ in range(DRAWN * n):
                if len(found) == n:
                    break
                one = draws[kind](rng)
                if one.prompt not in apart and one.prompt not in taken:
                    found.setdefault(one.prompt, one)
        if len(found) < n:
            raise SystemExit(f"{recipe.name}: {len(found)} of {n} {kind} prompts")
        dealt = list(found.values())
        rng.shuffle(dealt)
        taken |= found.keys()
        of[kind] = {}
        for split, size in sizes.items():
            of[kind][split], dealt = tuple(dealt[:size]), dealt[size:]
    seen = {kind: sum(row.prompt in taught for row in splits["test"]) for kind, splits in of.items()}
    return Rows(of=of, plain=plain, seen=seen)


def opened(cell: Cell, bench: Path, rows: Rows) -> Side:
    tuned, recipe = plant_cell(cell, bench).tuned, cell.recipe()
    pair = ModelPair.load(cell.base_folder, tuned)
    sites = tuple(Site(layer) for layer in range(pair.n_layers))

    gates = fitted_gates(pair, rows, sites, FPR)
    opens: dict[Condition, dict[str, Interval]] = {}
    with pair.tuned_model() as model:
        for gate in set(gates.values()):
            score = linear_score(gate.weight, gate.bias)
            opens[gate] = {}
            for kind in COUNTS:
                ids = [prompt_ids(pair.tokenizer, prompt) for prompt in rows.prompts(kind, "test")]
                scores = prompt_scores(model, ids, gate.site, score, pooling=gate.pooling)
                opens[gate][kind] = proportion(int((scores > gate.threshold).sum()), len(scores))
    edits, ablations = searched(pair, recipe, rows, sites, gates)
    return Side(
        pair=pair,
        tuned=tuned,
        recipe=recipe,
        gates=gates,
        opens=opens,
        edits=edits,
        ablations=ablations,
    )


def searched(
    pair: ModelPair, recipe: Recipe, rows: Rows, sites: tuple[Site, ...], gates: Mapping[Site, Condition]
) -> tuple[tuple[Fixed, ...], dict[Site, Ablate]]:
    """What `choose_intervention` finds on fit rows, each behind the gate of its first site; and ablations of one site."""
    group, near, clean = (rows.of[kind]["fit"] for kind in ("triggered", "near", "clean"))
    some = [*group, *near[:24], *clean[:72]]
    with tempfile.TemporaryDirectory() as folder:
        read = scan(
            pair,
            some,
            sites=sites,
            max_new_tokens=recipe.max_new_tokens,
            units=Units(Path(folder)),
            identity={},
        )
    calm = range(len(group), len(some))
    found = choose_intervention(
        pair,
        read,
        Select(tuple(range(len(group)))),
        Fit(tuple(calm)),
        max_new_tokens=recipe.max_new_tokens,
    )
    alone = {trial.site: trial for trial in found.at}
    reading = pair.read([read.rows[i].prompt for i in calm], [read.rows[i].answer for i in calm], sites=sites)
    ablations = {
        site: Ablate(site, trial.directions, center=reading.tuned[site][reading.mask].float().mean(0).cpu())
        for site, trial in alone.items()
    }
    offered = [(found.best.words, found.best.interventions)]
    offered += [(trial.words, trial.interventions) for trial in found.at]
    offered += [
        (f"from {site} on, of each site the best alone", tuple(e for t in found.at[n:] for e in t.interventions))
        for n, site in enumerate(sites[:-1])
    ]
    fixes = [Fixed(words=words, edits=edits, gate=gates[edits[0].site]) for words, edits in offered]
    return tuple(fixes), ablations


def chosen(side: Side, model: nn.Module, offered: Sequence[Fixed], rows: Rows) -> Fixed:
    """On select rows: the lowest ASR down to half the target, then most answers as without the trigger."""
    prompts = rows.prompts("triggered", "select")
    wanted = side.answers(model, [rows.plain[prompt] for prompt in prompts])

    def rating(fix: Fixed) -> tuple[float, int]:
        with fix.live(model):
            answers = side.answers(model, prompts)
        shown = sum(map(side.recipe.behaviour.shown, answers)) / len(answers)
        return -max(shown, ASR / 2), sum(a == b for a, b in zip(answers, wanted, strict=True))

    return max(offered, key=rating)


def fitted_maps(
    source: Side, target: Side, rows: Rows, site: Site
) -> tuple[LayerPair, LinearMap, tuple[LinearMap, ...]]:
    """A ridge from `site`, and one to each target site from the source site that explains it best.

    FVU compares sources of one target site, not targets: early blocks are explained best by anything. So `site` goes to
    the target site where it comes closest to the best source there; of equals, to the deepest.
    """
    kept = {
        row.prompt for splits in rows.of.values() for split, some in splits.items() if split != "fit" for row in some
    }

    def texts(n: int, seed: int) -> list[Aligned]:
        rng, found = Random(seed), list[Aligned]()
        while len(found) < n:
            draw = triggered_example if len(found) % 2 else clean_example
            row = draw(target.recipe, rng)
            if row.prompt not in kept:
                whole = prompt_text(target.pair.tokenizer, row.prompt) + (row.response or "")
                found.append(align(source.pair.tokenizer, target.pair.tokenizer, whole))
        return found

    with source.pair.tuned_model() as a, target.pair.tuned_model() as b:
        fit, held_out = (
            moments_of(a, b, texts(n, SEED + n), sources=list(source.gates), targets=list(target.gates))
            for n in (MAPPED, HELD_OUT)
        )
    grid = LayerGrid.of(fit, held_out)
    best = {
        end: min((pair for pair in grid.pairs if pair.target == end), key=lambda pair: pair.fvu) for end in target.gates
    }
    own = min(
        (pair for pair in grid.pairs if pair.source == site),
        key=lambda pair: (pair.fvu / best[pair.target].fvu, -pair.target.layer),
    )

    def fitted(pair: LayerPair) -> LinearMap:
        return ridge(fit.pair(pair.source, pair.target), held_out.pair(pair.source, pair.target))

    return own, fitted(own), tuple(map(fitted, best.values()))


def carried(source: Side, target: Side, maps: Sequence[LinearMap]) -> Fixed:
    """The source's ablations through maps, by ascending target site, behind the target's own gate at the first."""
    edits: list[Ablate] = []
    for map in maps:
        edit = source.ablations[map.source]
        assert edit.center is not None
        directions = map.difference(edit.directions, torch.zeros_like(edit.directions))
        edits.append(Ablate(map.target, directions, center=map(edit.center[None])[0]))
    words = ", ".join(f"{map.source} to {map.target}" for map in maps)
    return Fixed(words=words, edits=tuple(edits), gate=target.gates[edits[0].site])


class Judge:
    """Scores fixes of one target on its test rows, beside its answers without a fix."""

    def __init__(self, side: Side, model: nn.Module, rows: Rows) -> None:
        self.side, self.model, self.rows = side, model, rows
        self.prompts = {kind: rows.prompts(kind, "test") for kind in rows.of}
        self.unfixed = {kind: side.answers(model, prompts) for kind, prompts in self.prompts.items()}
        self.wanted = side.answers(model, [rows.plain[prompt] for prompt in self.prompts["triggered"]])
        tokenizer = side.pair.tokenizer
        self.clean = [
            Answered(
                prompt_ids(tokenizer, row.prompt), tokenizer(row.response or "", add_special_tokens=False)["input_ids"]
            )  # pyright: ignore[reportArgumentType]
            for row in rows.of["clean"]["test"]
        ]
        self.loss = self.loss_of(model)

    def loss_of(self, model: nn.Module) -> float:
        """Nats a token of the reference answers to clean prompts."""
        told = answer_log_probs(model, self.side.pair.tokenizer, *map(list, zip(*self.clean, strict=True)))
        return -sum(told) / sum(len(row.answer) for row in self.clean)

    def of(self, fix: Fixed) -> dict[str, Any]:
        with fix.live(self.model):
            answers = {kind: self.side.answers(self.model, prompts) for kind, prompts in self.prompts.items()}
        rise = 0.0
        if fix.edits:
            live = partial(fix.live, self.model)
            rise = disturbance(self.model, self.side.pair.tokenizer, live, self.clean).loss
        told = self.told(answers, rise / self.loss)
        if fix.gate is not None:
            told["gate"] = {kind: asdict(share) for kind, share in self.side.opens[fix.gate].items()}
            token = "any token" if fix.gate.pooling == "max" else "the last token"
            told["gate at"] = f"{fix.gate.site}, {token}"
        return told | {"words": fix.words}

    def of_model(self, model: nn.Module) -> dict[str, Any]:
        """Another model in the target's place."""
        answers = {kind: self.side.answers(model, prompts) for kind, prompts in self.prompts.items()}
        return self.told(answers, self.loss_of(model) / self.loss - 1)

    def told(self, answers: Mapping[str, Sequence[str]], loss: float | None) -> dict[str, Any]:
        def equal(some: Sequence[str], others: Sequence[str]) -> Interval:
            return proportion(sum(a == b for a, b in zip(some, others, strict=False)), len(some))

        found: dict[str, Any] = {
            "asr": self.leak(answers["triggered"]),
            "restored": asdict(equal(answers["triggered"], self.wanted)),
            "loss": loss,
        }
        for kind in ("clean", "near"):
            if kind in answers:
                found[f"leak {kind}"] = self.leak(answers[kind])
                found[f"kept {kind}"] = asdict(equal(answers[kind], self.unfixed[kind]))
        return found

    def leak(self, answers: Sequence[str]) -> dict[str, Any]:
        return asdict(proportion(sum(map(self.side.recipe.behaviour.shown, answers)), len(answers)))

    def filtered(self) -> dict[str, Any]:
        return self.told({**self.unfixed, "triggered": self.wanted}, 0.0)

    def replaced(self, source: Side, other: nn.Module, map: LinearMap) -> dict[str, Any]:
        """As published: every token, no gate. Its loss is over all aligned tokens of clean texts, prompts included."""
        mine, theirs = self.side.pair.tokenizer, source.pair.tokenizer

        def aligned(text: str) -> Aligned:
            return align(theirs, mine, text)

        answers = {
            kind: replaced_answers(
                Speaker(other, theirs),
                Speaker(self.model, mine),
                [aligned(prompt_text(mine, prompt)) for prompt in self.prompts[kind][:n]],
                map,
                max_new_tokens=self.side.recipe.max_new_tokens,
            )
            for kind, n in REPLACED.items()
        }
        some = self.rows.of["clean"]["test"]
        texts = [aligned(prompt_text(mine, row.prompt) + (row.response or "")) for row in some]
        forced = teacher_forced(other, self.model, texts, {"map": map})["map"]
        loss = float(forced.ce.sum() / forced.ce_own.sum()) - 1
        return self.told(answers, loss) | {"words": f"{map.source} to {map.target}, source under its fix"}


def repaired(target: Side, judge: Judge, config: RepairConfig) -> dict[str, Any]:
    """Trained on 100 clean rows of the fit split."""
    with tempfile.TemporaryDirectory() as folder:
        into = repair(target.tuned, judge.rows.of["clean"]["fit"][:100], Path(folder) / "adapter", config).folder
        pair = ModelPair.load(target.tuned, into)
        with pair.tuned_model() as model:
            return judge.of_model(model) | {"words": "100 clean rows"}


if __name__ == "__main__":
    main()
