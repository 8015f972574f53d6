"""One organism with everything that was fitted to it, and the fixes that are offered for it."""

import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from experiments.fixes.gates import fitted_gates
from experiments.fixes.rows import ASR, Rows
from molehunt.audit.answering import Answering
from molehunt.audit.intervention import choose_intervention
from molehunt.audit.scan import scan
from molehunt.bench.grid import Cell
from molehunt.bench.run import plant_cell
from molehunt.contracts import Intervention
from molehunt.measure.interval import Interval, proportion
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.model.taps import edit_sites
from molehunt.organism.poison import Recipe
from molehunt.run.unit import Units
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.steer.prefill_gate import Condition, linear_score, prompt_scores
from molehunt.steer.random_edit import RandomEdit
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.split import Fit, Select


@dataclass(frozen=True, kw_only=True, eq=False)
class Fixed:
    """Edits, behind a gate or not."""

    description: str
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


def opened(cell: Cell, bench: Path, rows: Rows, fpr: float) -> Side:
    tuned, recipe = plant_cell(cell, bench).tuned, cell.recipe()
    pair = ModelPair.load(cell.base_folder, tuned)
    sites = tuple(Site(layer) for layer in range(pair.n_layers))

    gates = fitted_gates(pair, rows, sites, fpr)
    opens: dict[Condition, dict[str, Interval]] = {}
    with pair.tuned_model() as model:
        for gate in set(gates.values()):
            score = linear_score(gate.weight, gate.bias)
            opens[gate] = {}
            for kind in rows.of:
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
            answering=Answering(max_new_tokens=recipe.max_new_tokens),
            units=Units(Path(folder)),
            identity={},
        )
    clean_rows = range(len(group), len(some))
    found = choose_intervention(
        pair,
        read,
        Select(tuple(range(len(group)))),
        Fit(tuple(clean_rows)),
        max_new_tokens=recipe.max_new_tokens,
    )
    alone = {trial.site: trial for trial in found.by_site}
    reading = pair.read(
        [read.rows[i].prompt for i in clean_rows], [read.rows[i].answer for i in clean_rows], sites=sites
    )
    ablations = {
        site: Ablate(site, trial.directions, center=reading.tuned[site][reading.mask].float().mean(0).cpu())
        for site, trial in alone.items()
    }
    offered = [(found.best.description, found.best.interventions)]
    offered += [(trial.description, trial.interventions) for trial in found.by_site]
    offered += [
        (f"from {site} on, of each site the best alone", tuple(e for t in found.by_site[n:] for e in t.interventions))
        for n, site in enumerate(sites[:-1])
    ]
    fixes = [Fixed(description=words, edits=edits, gate=gates[edits[0].site]) for words, edits in offered]
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
