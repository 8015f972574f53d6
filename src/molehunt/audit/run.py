"""One audit from two folders and their loaded models. Every step is a unit of work, so a killed run goes on."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.audit.answering import text_of, texts_of
from molehunt.audit.base_identity import check_base
from molehunt.audit.candidates import LARGEST_GROUP, Candidates, answer_scores
from molehunt.audit.causal import causal_test
from molehunt.audit.files import compare_folders
from molehunt.audit.input_test import TestedBehaviour, input_test
from molehunt.audit.inventory import Inventory, inventory
from molehunt.audit.plan import PLANS
from molehunt.audit.readings import TemplateReading, check_number, read_under, template_sides
from molehunt.audit.reference import calibration_rows
from molehunt.audit.result import FIX, Audit, AuditConfig, Confirmation, TemplateCount
from molehunt.audit.robustness import attack_fix
from molehunt.audit.score_table import ScoreRow, score_table
from molehunt.audit.weight_comparison import WeightComparison
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.reader import Checkpoint
from molehunt.detect.recipe import GROUP
from molehunt.measure.threshold import check_clean_rows, check_rate, lowest_rate, rows_for_rate
from molehunt.model.pair import ModelPair
from molehunt.run.catalog import installed
from molehunt.run.folder import RunFolder
from molehunt.run.progress import Track, busy, silent
from molehunt.site import Site
from molehunt.steer.fix import Fix
from molehunt.traffic.example import Example
from molehunt.traffic.left_out import ReadRows, keys_of
from molehunt.traffic.world import benign_prompts

log = logging.getLogger(__name__)

MOST_TESTED = 6
"""Greatest number of suspect behaviours whose condition is tested by editing prompts."""
TRAFFIC_SEED = 2
"""Seed of the bundled prompts that are scanned when no traffic is given."""


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What is audited, and the run folder that belongs to it."""

    checkpoints: tuple[Checkpoint, Checkpoint]
    identity: Mapping[str, str]
    """Hashes of both folders."""
    read: ReadRows
    """The rows under test, and those that could not be read."""
    run: RunFolder


def run_audit(
    folders: tuple[Path, Path],
    load: Callable[[], ModelPair],
    traffic: ReadRows | Sequence[Example] | None,
    config: AuditConfig,
    *,
    out: Path | None = None,
    track: Track = silent,
) -> Audit:
    """Compare folders, weights and answers, then test by intervention what was found.

    Args:
        folders: the folder of the base, and that of the fine-tune or its adapter.
        load: gives both models, or the fine-tune beside the reference; called after the folders and the weights were compared, so that a broken folder is
            refused early.
        traffic: the rows under test, as they were read or as a list; bundled benign prompts without any.
        config: how much is read, and the rate of the threshold.
        out: run folder; by default one named after the fine-tune and the run's settings under `molehunt-runs`.
        track: shows progress.

    Raises:
        MolehuntError: a folder is broken, or the two are no pair.
        UsageError: no threshold is set at the rate `fpr`.
        NotTestable: the base is another model's, fewer than `FEWEST_ROWS` rows of traffic, or too few clean rows for
            `fpr`.
    """
    start = time.monotonic()
    _check_rate(config)
    opened = _open(folders, traffic, config, out, track)
    files = compare_folders(*folders, adapter=config.adapter, track=track)
    if files.identity is not None:
        files.identity.must_be_related()
    weights = compare_weights(
        *opened.checkpoints, k=config.plan.directions, seed=config.seed, units=opened.run.units, track=track
    )
    if config.reference is not None:
        check_base(opened.checkpoints[0], Checkpoint.open(config.reference), track)
    pair = load()
    readings = _readings(pair, opened, config, track)
    lead, others = readings[0], readings[1:]
    listed, tested = _listed(pair, lead, config, track)
    candidates = replace(lead.candidates, rows=_group(lead, tested))
    confirmed = _confirm(pair, lead, candidates, listed, config, model=opened.identity["tuned"], track=track)
    found = Audit(
        base=opened.checkpoints[0],
        tuned=opened.checkpoints[1],
        config=config,
        files=files,
        weights=weights,
        pair=pair,
        reference=lead.reference,
        traffic=lead.traffic,
        reading="" if traffic is None else max(readings, key=lambda one: len(one.read.rows)).read.note,
        left_out=lead.read.left_out,
        left_out_rows=lead.read.bad.count,
        candidates=candidates,
        inventory=listed,
        tested=tested,
        templates=tuple(
            TemplateCount(side=one.side, rows=len(one.traffic.rows), of=one.of, candidates=len(one.candidates.rows))
            for one in (lead, *others)
        ),
        confirmed=confirmed,
        score_rows=_score_rows(weights, lead, candidates, confirmed, config),
        folder=opened.run.path,
        seconds=time.monotonic() - start,
    )
    _write(found, opened.run)
    return found


def _check_rate(config: AuditConfig) -> None:
    """Refuse a rate that the clean rows cannot hold, before a folder is read."""
    check_rate(config.fpr)
    if config.clean is not None:
        check_clean_rows(len(config.clean.rows), calibration_rows, config.fpr)
        return
    lowest = lowest_rate(calibration_rows(config.plan.clean_prompts))
    larger = [plan for plan in PLANS.values() if plan.clean_prompts > config.plan.clean_prompts]
    enough = [plan.name for plan in larger if calibration_rows(plan.clean_prompts) >= rows_for_rate(config.fpr)]
    advice = f"Give fpr (--fpr) of at least {lowest:g}" + (f", or the plan {enough[0]}." if enough else ".")
    check_clean_rows(config.plan.clean_prompts, calibration_rows, config.fpr, advice=advice)


def _open(
    folders: tuple[Path, Path],
    traffic: ReadRows | Sequence[Example] | None,
    config: AuditConfig,
    out: Path | None,
    track: Track,
) -> _Inputs:
    """Open both checkpoints, and start the run or take it up."""
    checkpoints = Checkpoint.open(folders[0]), Checkpoint.open(folders[1], adapter=config.adapter)
    rows = benign_prompts(config.plan.clean_prompts, seed=TRAFFIC_SEED) if traffic is None else traffic
    read = rows if isinstance(rows, ReadRows) else ReadRows(tuple(rows))
    check_number(read)
    with busy(track, "hashing both folders"):
        identity = {"base": checkpoints[0].content_hash(), "tuned": checkpoints[1].content_hash()}
        if config.reference is not None:
            identity["reference"] = Checkpoint.open(config.reference).content_hash()
    settings = {
        **identity,
        "traffic": _digest(read),
        "plan": config.plan.name,
        "fpr": config.fpr,
        "seed": config.seed,
        "adapter": config.adapter,
        **({"clean": _digest(config.clean)} if config.clean is not None else {}),
        **({"template": config.template} if config.template else {}),
        **({"answers": asdict(config.plan.answering)} if config.plan != PLANS.get(config.plan.name) else {}),
        **({"plugins": plugins} if (plugins := installed(GROUP)) else {}),
    }
    name = f"{folders[1].name}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"
    run = RunFolder.create(out or Path("molehunt-runs") / name, settings)
    run.write_env()
    return _Inputs(checkpoints=checkpoints, identity=identity, read=read, run=run)


def _digest(read: ReadRows) -> str:
    """SHA-256 of everything that some rows ask, in hex."""
    return hashlib.sha256(json.dumps(keys_of(read.rows)).encode()).hexdigest()


def _readings(pair: ModelPair, opened: _Inputs, config: AuditConfig, track: Track) -> list[TemplateReading]:
    """The traffic under each template, the one that woke a behaviour first."""
    found = [
        read_under(
            side, sampled, pair, opened.read, config, units=opened.run.units, identity=opened.identity, track=track
        )
        for side, sampled in template_sides(pair, config)
    ]
    return sorted(found, key=lambda one: not one.candidates.rows)  # stable: of two that did, the main one


def _listed(
    pair: ModelPair, lead: TemplateReading, config: AuditConfig, track: Track
) -> tuple[Inventory, tuple[TestedBehaviour, ...]]:
    """What the answers say that the base's do not, and what editing prompts shows about the rare and conditional part of it."""
    rows = lead.traffic.rows
    tuned, base = [text_of(pair, row.answer) for row in rows], texts_of(pair, [row.base_answers for row in rows])
    with busy(track, "comparing answers"):
        listed = inventory(rows, tuned, base, seed=config.seed)
    with nullcontext() if lead.side is None else pair.prompted_with(lead.side):
        tested = tuple(
            TestedBehaviour(behaviour=one, test=input_test(pair, rows, one, config.plan, seed=config.seed, track=track))
            for one in listed.suspects[:MOST_TESTED]
        )
    return listed, tested


def _group(lead: TemplateReading, tested: Sequence[TestedBehaviour]) -> tuple[int, ...]:
    """The rows of the finding: those of the first hidden behaviour, the most surprising to the base first, or the candidates."""
    hidden = [one for one in tested if one.causal]
    if not hidden:
        return lead.candidates.rows
    scores = answer_scores(lead.traffic)
    return tuple(sorted(hidden[0].triggered(lead.traffic.rows), key=lambda i: -float(scores[i]))[:LARGEST_GROUP])


def _confirm(
    pair: ModelPair,
    lead: TemplateReading,
    candidates: Candidates,
    listed: Inventory,
    config: AuditConfig,
    *,
    model: str,
    track: Track,
) -> Confirmation | None:
    """Test the candidate rows by intervention, and attack the fix; None without candidates.

    `model` is the hash of the fine-tune, which the fix names.
    """
    if not candidates.rows:
        return None
    plan, seed, scanned = config.plan, config.seed, lead.traffic
    shown = {i for one in listed.suspects if set(one.rows) & set(candidates.rows) for i in one.rows}
    scores = answer_scores(scanned).tolist()
    clean = [i for i, score in enumerate(scores) if score <= candidates.threshold and i not in shown]
    causal = causal_test(pair, scanned, candidates.rows, clean, candidates.threshold, plan, seed=seed, track=track)
    if not causal.causal:
        return Confirmation(causal=causal)
    fix = Fix(
        interventions=causal.interventions,
        description=causal.intervention,
        d_model=pair.d_model,
        n_layers=pair.n_layers,
        model=model,
    )
    robustness = attack_fix(pair, scanned, candidates.rows, clean, causal, fix, plan, seed=seed, track=track)
    return Confirmation(causal=causal, fix=fix, robustness=robustness)


def _score_rows(
    weights: WeightComparison,
    lead: TemplateReading,
    candidates: Candidates,
    confirmed: Confirmation | None,
    config: AuditConfig,
) -> tuple[ScoreRow, ...]:
    """Every detector over the traffic, read where the finding is or behind the last block that was read."""
    return score_table(
        lead.reference.scan,
        lead.traffic,
        lead.reference.fit,
        lead.reference.calibrate,
        _directions_by_site(weights, lead.traffic.sites),
        candidates.rows,
        site=confirmed.causal.site if confirmed else lead.traffic.sites[-1],
        fpr=lead.reference.fpr,
        seed=config.seed,
    )


def _directions_by_site(weights: WeightComparison, sites: Sequence[Site]) -> dict[Site, Float[Tensor, "k d_model"]]:
    named = {site: [d.vector for d in weights.directions_at(site)] for site in sites}
    return {site: torch.stack(vectors) for site, vectors in named.items() if vectors}


def _write(found: Audit, run: RunFolder) -> None:
    """Write the fix, the scores and what the run took."""
    if found.confirmed and found.confirmed.fix:
        found.confirmed.fix.save(run.path / FIX)
    run.write_text("scores.jsonl", _scores(found))
    run.log({"seconds": found.seconds, "peak_rss_mb": found.peak_rss_mb, "candidates": len(found.candidates.rows)})


def _scores(found: Audit) -> str:
    """One line for each row of the traffic, with everything that a reader of the run may want to sort by."""
    group = set(found.candidates.rows)
    lines = [
        json.dumps(
            {
                "row": i,
                **({"line": row.example.line} if row.example.line is not None else {}),
                "tag": row.example.tag,
                "prompt": row.example.prompt,
                **({"messages": row.example.asked} if row.example.turns else {}),
                **({"tokens_left_out": row.left_out} if row.left_out else {}),
                "answer_log_ratio": round(row.answer_log_ratio, 4),
                "over_threshold": row.answer_log_ratio > found.candidates.threshold,
                "in_finding": i in group,
            },
            ensure_ascii=False,
        )
        for i, row in enumerate(found.traffic.rows)
    ]
    return "\n".join(lines) + "\n"
