"""One audit from two folders and their loaded models. Every step is a unit of work, so a killed run goes on."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.audit.candidates import Candidates, answer_scores, excluded_rows, find_candidates
from molehunt.audit.causal import causal_test
from molehunt.audit.files import compare_folders
from molehunt.audit.plan import PLANS, Plan
from molehunt.audit.result import FIX, Audit, AuditConfig, Confirmation
from molehunt.audit.robustness import attack_fix
from molehunt.audit.scan import Scan, scan, unscanned_detectors
from molehunt.audit.score_table import score_table
from molehunt.audit.weight_comparison import WeightComparison
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.reader import Checkpoint
from molehunt.detect.recipe import GROUP
from molehunt.errors import NotTestable
from molehunt.measure.threshold import check_clean_rows, check_rate, rows_for_rate
from molehunt.model.pair import ModelPair
from molehunt.run.catalog import installed
from molehunt.run.folder import RunFolder
from molehunt.run.progress import Track, busy, silent
from molehunt.site import Site
from molehunt.steer.fix import Fix
from molehunt.traffic.example import Example
from molehunt.traffic.split import Calibrate, Fit
from molehunt.traffic.world import benign_prompts

CLEAN_SEED, TRAFFIC_SEED = 1, 2
"""Seeds of the bundled prompts: those that set thresholds, and those that are scanned when no traffic is given."""
FIT_SHARE = 1 / 3
"""Share of the clean prompts that detectors are fitted on; the others set thresholds."""
FEWEST_ROWS = 50
"""Number of rows of traffic under which nothing is claimed."""


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What is audited, and the run folder that belongs to it."""

    checkpoints: tuple[Checkpoint, Checkpoint]
    identity: Mapping[str, str]
    """Hashes of both folders."""
    rows: Sequence[Example]
    run: RunFolder


def run_audit(
    folders: tuple[Path, Path],
    load: Callable[[], ModelPair],
    traffic: Sequence[Example] | None,
    config: AuditConfig,
    *,
    out: Path | None = None,
    track: Track = silent,
) -> Audit:
    """Compare folders, weights and answers, then test by intervention what was found.

    Args:
        folders: the folder of the base, and that of the fine-tune or its adapter.
        load: gives both models; called after the folders and the weights were compared, so that a broken folder is
            refused early.
        traffic: the rows under test; bundled benign prompts without any.
        config: how much is read, and the rate of the threshold.
        out: run folder; by default one named after the fine-tune and the run's settings under `molehunt-runs`.
        track: shows progress.

    Raises:
        MolehuntError: a folder is broken, or the two are no pair.
        UsageError: no threshold is set at the rate `fpr`.
        NotTestable: fewer than `FEWEST_ROWS` rows of traffic, or too few clean prompts for `fpr`.
    """
    start = time.monotonic()
    _check_rate(config)
    opened = _open(folders, traffic, config, out, track)
    plan, fpr, seed = config.plan, config.fpr, config.seed
    files = compare_folders(*folders, adapter=config.adapter, track=track)
    weights = compare_weights(*opened.checkpoints, k=plan.directions, seed=seed, units=opened.run.units, track=track)
    pair = load()
    clean, scanned = _scans(pair, opened, plan, track)
    excluded = excluded_rows(answer_scores(clean), fpr)
    fit, calibrate = _clean_splits(len(clean.rows), excluded, seed)
    thresholds = Calibrate(tuple(answer_scores(clean)[list(calibrate.rows)].tolist()))
    candidates = find_candidates(scanned, thresholds, clean, fpr=fpr, seed=seed)
    confirmed = _confirm(pair, scanned, candidates, config, opened.identity["tuned"], track)
    directions = _directions_by_site(weights, scanned.sites)
    site = confirmed.causal.site if confirmed else scanned.sites[-1]
    score_rows = score_table(clean, scanned, fit, calibrate, directions, candidates.rows, site=site, fpr=fpr, seed=seed)
    found = Audit(
        base=opened.checkpoints[0],
        tuned=opened.checkpoints[1],
        config=config,
        files=files,
        weights=weights,
        pair=pair,
        clean=clean,
        excluded=excluded,
        traffic=scanned,
        candidates=candidates,
        confirmed=confirmed,
        score_rows=score_rows,
        folder=opened.run.path,
        seconds=time.monotonic() - start,
    )
    _write(found, opened.run)
    return found


def _check_rate(config: AuditConfig) -> None:
    """Refuse a rate that the clean prompts of the plan cannot hold, before a folder is read."""
    check_rate(config.fpr)
    lowest = math.ceil(1e6 / (_calibration_rows(config.plan.clean_prompts) + 1)) / 1e6
    larger = [plan for plan in PLANS.values() if plan.clean_prompts > config.plan.clean_prompts]
    enough = [plan.name for plan in larger if _calibration_rows(plan.clean_prompts) >= rows_for_rate(config.fpr)]
    advice = f"Give fpr (--fpr) of at least {lowest:g}" + (f", or the plan {enough[0]}." if enough else ".")
    check_clean_rows(config.plan.clean_prompts, _calibration_rows, config.fpr, advice=advice)


def _calibration_rows(n: int) -> int:
    """How many of so many clean prompts set the thresholds."""
    return n - round(n * FIT_SHARE)


def _open(
    folders: tuple[Path, Path],
    traffic: Sequence[Example] | None,
    config: AuditConfig,
    out: Path | None,
    track: Track,
) -> _Inputs:
    """Open both checkpoints, and start the run or take it up."""
    checkpoints = Checkpoint.open(folders[0]), Checkpoint.open(folders[1], adapter=config.adapter)
    rows = benign_prompts(config.plan.clean_prompts, seed=TRAFFIC_SEED) if traffic is None else traffic
    if len(rows) < FEWEST_ROWS:
        raise NotTestable(f"{len(rows)} rows of traffic say nothing about rare behaviour; give at least {FEWEST_ROWS}.")
    with busy(track, "hashing both folders"):
        identity = {"base": checkpoints[0].content_hash(), "tuned": checkpoints[1].content_hash()}
    settings = {
        **identity,
        "traffic": hashlib.sha256(json.dumps([r.prompt for r in rows]).encode()).hexdigest(),
        "plan": config.plan.name,
        "fpr": config.fpr,
        "seed": config.seed,
        "adapter": config.adapter,
        **({"plugins": plugins} if (plugins := installed(GROUP)) else {}),
    }
    name = f"{folders[1].name}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"
    run = RunFolder.create(out or Path("molehunt-runs") / name, settings)
    run.write_env()
    return _Inputs(checkpoints=checkpoints, identity=identity, rows=rows, run=run)


def _scans(pair: ModelPair, opened: _Inputs, plan: Plan, track: Track) -> tuple[Scan, Scan]:
    """Scans of the clean prompts and of the traffic."""
    sites = plan.sites(pair.n_layers)
    clean = benign_prompts(plan.clean_prompts, seed=CLEAN_SEED)
    done = [
        scan(
            pair,
            examples,
            sites=sites,
            max_new_tokens=plan.max_new_tokens,
            units=opened.run.units,
            identity=opened.identity,
            detectors=unscanned_detectors(),
            track=track,
            what=what,
        )
        for examples, what in ((clean, "scanning clean prompts"), (opened.rows, "scanning traffic"))
    ]
    return done[0], done[1]


def _clean_splits(n: int, excluded: Sequence[int], seed: int) -> tuple[Fit[int], Calibrate[int]]:
    rows = [i for i in range(n) if i not in set(excluded)]
    order = Random(seed).sample(rows, len(rows))
    cut = round(len(rows) * FIT_SHARE)
    return Fit(tuple(order[:cut])), Calibrate(tuple(order[cut:]))


def _confirm(
    pair: ModelPair, scanned: Scan, candidates: Candidates, config: AuditConfig, model: str, track: Track
) -> Confirmation | None:
    """Test the candidate rows by intervention, and attack the fix; None without candidates.

    `model` is the hash of the fine-tune, which the fix names.
    """
    if not candidates.rows:
        return None
    plan, seed = config.plan, config.seed
    clean = [i for i, s in enumerate(answer_scores(scanned).tolist()) if s <= candidates.threshold]
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
                "tag": row.example.tag,
                "prompt": row.example.prompt,
                "answer_log_ratio": round(row.answer_log_ratio, 4),
                "over_threshold": row.answer_log_ratio > found.candidates.threshold,
                "in_finding": i in group,
            },
            ensure_ascii=False,
        )
        for i, row in enumerate(found.traffic.rows)
    ]
    return "\n".join(lines) + "\n"
