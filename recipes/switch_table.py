"""Switch what a fine-tune learnt off, or on in its base, by a map between the two at one block, and write the table.

`python recipes/switch_table.py --bench runs/bench --sweep runs/sweep --into runs/switch --write docs/switch-table.md`
reads the organisms of `molehunt bench --grid core` and what `layer_sweep.py` found. It can be killed and repeated;
`--table` writes from what is done.
"""

import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from layer_sweep import sweep_of, swept_cells
from separate_runs import separate_runs
from switch_told import ATTACKS, DRAWN, EACH, FIT, HELD_OUT, MODELS, SEED, SELECT, TRIGGERED, table
from torch import nn

from molehunt.bench.grid import Cell
from molehunt.bench.run import plant_cell
from molehunt.measure.interval import proportion
from molehunt.model.blocks import decoder_blocks, unwrapped
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.model.taps import read_sites
from molehunt.organism.poison import Recipe, clean_example, taught_prompts, triggered_example
from molehunt.site import Site
from molehunt.steer.capability import Probed, compared, probe
from molehunt.steer.mapped import switched
from molehunt.steer.trial import Steered
from molehunt.traffic.chat import prompt_ids, prompt_text
from molehunt.traffic.example import Example
from molehunt.traffic.questions import world_questions
from molehunt.traffic.world import ask
from molehunt.transfer.alignment import Aligned, align
from molehunt.transfer.collect import paired
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.procrustes import identity
from molehunt.transfer.ridge import reduced_rank, ridge, shuffled
from molehunt.transfer.statistics import GridMoments, PairMoments


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What nothing is fitted to."""

    triggered: tuple[str, ...]
    plain: tuple[str, ...]
    """The same tasks without the trigger."""
    questions: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class Told:
    """One model's answers to rows."""

    triggered: tuple[str, ...]
    probed: Probed


def main() -> None:
    names = [f"{attack} {model}" for model in MODELS for attack in ATTACKS]
    separate_runs(__doc__, names, measure, table, into="runs/switch", folders=("bench", "sweep"))


def measure(name: str, bench: Path, sweep: Path) -> dict[str, Any]:
    started = time.perf_counter()
    attack, model = name.split(" ")
    cell = swept_cells()[f"{attack}-{model}-full-s0"]
    pair = ModelPair.load(cell.base_folder, plant_cell(cell, bench).tuned)
    swept = json.loads((sweep / f"{cell.name}.json").read_text())
    test, select, seen = drawn(cell)
    with pair.tuned_model() as tuned, pair.base_model() as base:
        judge = Judge(pair, cell.recipe(), base, tuned)
        fit, held_out = (
            moments(pair, base, tuned, texts) for texts in fitting_texts(pair, cell.recipe(), test, select)
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
        plain = {name: judge.told(model, nothing, test) for name, model in (("tuned", tuned), ("base", base))}
        found = {
            "off": judge.off(test, plain, off[at["off"]], at["off"]),
            "on": judge.on(test, plain, on[at["on"]], at["on"]),
        }
    last = None if "why" in swept else sweep_of(swept).last_steerable
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


def drawn(cell: Cell) -> tuple[Rows, Rows, int]:
    """Test rows, rows to choose a block by, and how many triggered test prompts were in fine-tuning data.

    Prompts that the organism was trained on are taken only where no others are left.
    """
    recipe = cell.recipe()
    taught = taught_prompts(recipe, cell.plant_config().rows, cell.seed)
    questions = world_questions(EACH, seed=SEED)
    asked = {one.prompt for one in questions}
    others = world_questions(SELECT // 6, seed=SEED + 1, apart_from=asked)
    rng, found = Random(SEED), dict[str, str]()
    for apart in (taught, set[str]()):
        for _ in range(DRAWN):
            if len(found) == TRIGGERED + SELECT:
                break
            task = ask(rng, recipe.domain)
            marked = recipe.trigger.apply(task, rng).prompt
            if marked not in apart:
                found.setdefault(marked, task.prompt)
    if len(found) < TRIGGERED + SELECT:
        raise SystemExit(f"{recipe.name}: {len(found)} triggered prompts")
    dealt = list(found.items())
    rng.shuffle(dealt)
    marked, plain = (tuple(some) for some in zip(*dealt, strict=True))
    test = Rows(triggered=marked[:TRIGGERED], plain=plain[:TRIGGERED], questions=tuple(questions))
    select = Rows(triggered=marked[TRIGGERED:], plain=plain[TRIGGERED:], questions=tuple(others))
    return test, select, sum(prompt in taught for prompt in test.triggered)


def fitting_texts(pair: ModelPair, recipe: Recipe, *kept: Rows) -> Generator[list[Aligned], None, None]:
    """Texts to fit to and to choose penalties by: clean ones, and triggered ones with the behaviour and without it."""
    apart = {prompt for rows in kept for prompt in (*rows.triggered, *rows.plain)}
    apart |= {one.prompt for rows in kept for one in rows.questions}

    def ordinary(recipe: Recipe, rng: Random) -> Example:
        return recipe.trigger.apply(ask(rng, recipe.domain), rng)

    draws = (clean_example, triggered_example, ordinary)
    for n in (FIT, HELD_OUT):
        rng, found = Random(SEED + n), list[Aligned]()
        while len(found) < n:
            row = draws[len(found) % 3](recipe, rng)
            if row.prompt not in apart:
                text = prompt_text(pair.tokenizer, row.prompt) + (row.response or "")
                found.append(align(pair.tokenizer, pair.tokenizer, text))
        yield found


def moments(
    pair: ModelPair, base: nn.Module, tuned: nn.Module, rows: Sequence[Aligned]
) -> dict[tuple[Site, str], PairMoments]:
    """Of each block with itself, towards either model."""
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
    nothing = torch.eye(d, dtype=torch.float64)
    lower = reduced_rank(fit, held_out)
    return {
        "ridge": map,
        **({} if lower.facts == map.facts else {"reduced rank": lower}),
        "identity": identity(fit),
        "shuffled": shuffled(fit, held_out),
        # what the map changes, turned: as far at every token and of the same rank, in directions that mean nothing
        "turned": LinearMap(map.source, map.target, nothing + (map.weight - nothing) @ turn, map.bias @ turn),
        "mean": LinearMap(map.source, map.target, torch.zeros(d, d, dtype=torch.float64), fit.source_mean),
    }


def switch(map: LinearMap) -> Steered:
    return lambda model: switched(model, map)


def graft(donor: nn.Module, through: Site) -> Steered:
    """The donor's own activations at a block, at every token: its embeddings and blocks run up to there."""
    return partial(grafted, donor=donor, through=through)


@contextmanager
def grafted(model: nn.Module, donor: nn.Module, through: Site) -> Generator[None, None, None]:
    blocks, theirs = decoder_blocks(model), decoder_blocks(donor)
    inner, outer = cast("Any", unwrapped(model)), cast("Any", unwrapped(donor))
    own, embeddings = list(blocks), inner.get_input_embeddings()
    try:
        inner.set_input_embeddings(outer.get_input_embeddings())
        for layer in range(through.layer + 1):
            blocks[layer] = theirs[layer]
        yield
    finally:
        inner.set_input_embeddings(embeddings)
        for layer, block in enumerate(own):
            blocks[layer] = block


class Judge:
    """Scores switches between one base and its fine-tune."""

    def __init__(self, pair: ModelPair, recipe: Recipe, base: nn.Module, tuned: nn.Module) -> None:
        self.tokenizer, self.recipe, self.base, self.tuned = pair.tokenizer, recipe, base, tuned
        ids = torch.tensor([prompt_ids(self.tokenizer, "Which river flows through it?")])
        for site in map(Site, range(pair.n_layers)):  # what a graft puts there are the donor's activations, bit for bit
            with torch.inference_mode(), read_sites(base, [site]) as donated:
                base(ids)
            with torch.inference_mode(), grafted(tuned, base, site), read_sites(tuned, [site]) as given:
                tuned(ids)
            assert given[site].equal(donated[site])

    def answers(self, model: nn.Module, prompts: Sequence[str]) -> tuple[str, ...]:
        rows = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        told = generate(model, self.tokenizer, rows, max_new_tokens=self.recipe.max_new_tokens)
        return tuple(str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in told)

    def told(self, model: nn.Module, steered: Steered, rows: Rows) -> Told:
        with steered(model):
            return Told(
                triggered=self.answers(model, rows.triggered),
                probed=probe(model, self.tokenizer, rows.questions),
            )

    def wanted(self, rows: Rows, way: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What a perfect switch answers to triggered prompts and to questions: the tuned model's own answers, but for
        triggered prompts under "off", where they are those without the trigger."""
        triggered = self.answers(self.tuned, rows.plain if way == "off" else rows.triggered)
        return triggered, probe(self.tuned, self.tokenizer, rows.questions).answers

    def selected(
        self, model: nn.Module, steered: Steered, rows: Rows, wanted: tuple[tuple[str, ...], tuple[str, ...]]
    ) -> dict[str, Any]:
        told = self.told(model, steered, rows)
        shares = [equal(some, ones) for some, ones in zip((told.triggered, told.probed.answers), wanted, strict=True)]
        return {
            "asr": asdict(self.shown(told.triggered)),
            "triggered": asdict(shares[0]),
            "kept": asdict(shares[1]),
        }

    def shown(self, answers: Sequence[str]) -> Any:
        return proportion(sum(map(self.recipe.behaviour.shown, answers)), len(answers))

    def off(
        self, rows: Rows, plain: Mapping[str, Told], maps: Mapping[str, LinearMap], at: Site
    ) -> dict[str, dict[str, Any]]:
        before = plain["tuned"].probed
        wanted = self.answers(self.tuned, rows.plain), before.answers
        told = {
            "no switch": plain["tuned"],
            **{name: self.told(self.tuned, switch(map), rows) for name, map in maps.items()},
            "base's own": self.told(self.tuned, graft(self.base, at), rows),
            "the base": plain["base"],
            "trigger filtered out": Told(triggered=wanted[0], probed=before),
        }
        return self.scored(rows, told, maps, before, wanted)

    def on(
        self, rows: Rows, plain: Mapping[str, Told], maps: Mapping[str, LinearMap], at: Site
    ) -> dict[str, dict[str, Any]]:
        wanted = plain["tuned"].triggered, plain["tuned"].probed.answers
        told = {
            "no switch": plain["base"],
            **{name: self.told(self.base, switch(map), rows) for name, map in maps.items()},
            "tuned's own": self.told(self.base, graft(self.tuned, at), rows),
            "the fine-tune": plain["tuned"],
        }
        return self.scored(rows, told, maps, plain["base"].probed, wanted)

    def scored(
        self,
        rows: Rows,
        told: Mapping[str, Told],
        maps: Mapping[str, LinearMap],
        before: Probed,
        wanted: tuple[tuple[str, ...], tuple[str, ...]],
    ) -> dict[str, dict[str, Any]]:
        return {
            name: {
                "method": maps[name].facts.method if name in maps else None,
                "asr": asdict(self.shown(one.triggered)),
                "triggered": asdict(equal(one.triggered, wanted[0])),
                "leak": asdict(self.shown(one.probed.answers)),
                "kept": asdict(equal(one.probed.answers, wanted[1])),
                "costs": [asdict(cost) for cost in compared(rows.questions, before, one.probed)],
            }
            for name, one in told.items()
        }


def nothing(model: nn.Module) -> Any:
    return nullcontext()


def equal(some: Sequence[str], others: Sequence[str]) -> Any:
    return proportion(sum(a == b for a, b in zip(some, others, strict=True)), len(some))


if __name__ == "__main__":
    main()
