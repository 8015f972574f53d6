"""The main job: one audit from two folders to a report. Every step is a unit of work, so a killed run goes on."""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.audit.candidates import Candidates, answer_scores, find_candidates, set_aside
from molehunt.audit.causal import CausalTest, causal_test
from molehunt.audit.files import FolderComparison, compare_folders
from molehunt.audit.holding import Holding, attack_fix
from molehunt.audit.ladder import Rung, ladder
from molehunt.audit.plan import Plan
from molehunt.audit.scan import Scan, scan
from molehunt.audit.weight_comparison import WeightComparison
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.reader import AdapterChoice, Checkpoint
from molehunt.errors import NotTestable, printable
from molehunt.model.pair import ModelPair, local_folder
from molehunt.run.folder import RunFolder
from molehunt.run.progress import Track, busy, silent
from molehunt.run.unit import Units
from molehunt.site import Site
from molehunt.steer.fix import Fix
from molehunt.traffic.benign import benign_prompts
from molehunt.traffic.example import Example
from molehunt.traffic.split import Calibrate, Fit
from molehunt.traffic.stream import read_traffic

CLEAN_SEED, TRAFFIC_SEED = 1, 2
"""Draws of bundled prompts: what sets thresholds, and what is scanned when the user gives no traffic."""
FIT_SHARE = 1 / 3
"""Share of the clean prompts that detectors are fitted on; the others set thresholds."""
FEWEST_ROWS = 50
"""Rows of traffic under which nothing is claimed."""
DEFAULT_FPR = 0.01
FIX = "fix.safetensors"
"""In the run folder: interventions that switch the finding off."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Everything that one audit measured; `report.build.build_report` turns it into pages."""

    base: Checkpoint
    tuned: Checkpoint
    plan: Plan
    fpr: float
    seed: int
    files: FolderComparison
    weights: WeightComparison
    pair: ModelPair
    clean: Scan
    aside: tuple[int, ...]
    """Rows of `clean` that were left out of calibration: see `set_aside`."""
    traffic: Scan
    traffic_name: str
    candidates: Candidates
    causal: CausalTest | None
    holding: Holding | None
    """Of the fix; None where there is none."""
    rungs: tuple[Rung, ...]
    folder: Path
    seconds: float

    @property
    def fix(self) -> Path | None:
        """What was shown to switch the finding off, as a file; None where nothing was."""
        return self.folder / FIX if self.causal is not None and self.causal.causal else None

    @property
    def tokens(self) -> int:
        """Prompt and answer tokens that went through both models in the scan."""
        return sum(len(r.prompt) + len(r.answer) for s in (self.clean, self.traffic) for r in s.rows)

    @property
    def peak_rss_mb(self) -> float:
        """Largest resident size of this process so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**10 if sys.platform != "darwin" else peak / 2**20


def run_audit(
    base: str,
    tuned: str,
    *,
    traffic: Path | None,
    plan: Plan,
    out: Path | None = None,
    fpr: float = DEFAULT_FPR,
    seed: int = 0,
    adapter: bool | None = None,
    device: str = "cpu",
    track: Track = silent,
) -> Audit:
    """Compare folders, weights and answers, then test by intervention what was found.

    Args:
        base: folder or hub id of the model before fine-tuning.
        tuned: folder or hub id of the fine-tune or its adapter.
        traffic: JSONL or parquet of prompts; bundled benign prompts without one.
        plan: how much is read.
        out: run folder; by default one named after the fine-tune and the run's settings under `molehunt-runs`.
        fpr: false-positive rate, per prompt, of the clean threshold.
        seed: of everything random.
        adapter: for a folder that holds full weights and an adapter, whether the adapter is applied.
        device: where the models run.
        track: shows progress.

    Raises:
        MolehuntError: a folder is broken, the two are no pair, or the traffic cannot be read.
        NotTestable: fewer than `FEWEST_ROWS` rows of traffic, or too few clean prompts for `fpr`.
    """
    start = time.monotonic()
    choice: AdapterChoice = "refuse" if adapter is None else "use" if adapter else "ignore"
    folders = local_folder(base), local_folder(tuned)
    checkpoints = Checkpoint.open(folders[0]), Checkpoint.open(folders[1], adapter=choice)
    with busy(track, "hashing both folders"):
        identity = {"base": checkpoints[0].content_hash(), "tuned": checkpoints[1].content_hash()}
    rows = (
        list(read_traffic(traffic, plan.traffic_limit))
        if traffic
        else benign_prompts(plan.clean_prompts, seed=TRAFFIC_SEED)
    )
    if len(rows) < FEWEST_ROWS:
        raise NotTestable(f"{len(rows)} rows of traffic say nothing about rare behaviour; give at least {FEWEST_ROWS}.")
    settings = {
        **identity,
        "traffic": hashlib.sha256(json.dumps([r.prompt for r in rows]).encode()).hexdigest(),
        "plan": plan.name,
        "fpr": fpr,
        "seed": seed,
        "adapter": choice,
    }
    name = f"{folders[1].name}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"
    run = RunFolder.create(out or Path("molehunt-runs") / name, settings)
    run.write_env()

    files = compare_folders(folders[0], folders[1], adapter=choice, track=track)
    weights = compare_weights(*checkpoints, k=plan.directions, seed=seed, units=run.units, track=track)
    with busy(track, f"loading {printable(folders[0].name)} and {printable(folders[1].name)}"):
        pair = ModelPair.load(folders[0], folders[1], adapter=adapter, device=device)
    clean, scanned = _scans(pair, rows, plan, run.units, identity, track)
    aside = set_aside(answer_scores(clean), fpr)
    fit, calibrate = _clean_splits([i for i in range(len(clean.rows)) if i not in set(aside)], seed)
    named = _directions_by_site(weights, scanned.sites)
    candidates = find_candidates(
        scanned, Calibrate(tuple(answer_scores(clean)[list(calibrate.rows)].tolist())), clean, fpr=fpr, seed=seed
    )
    causal, fix, holding = None, None, None
    if candidates.rows:
        calm = [i for i, s in enumerate(answer_scores(scanned).tolist()) if s <= candidates.threshold]
        causal = causal_test(pair, scanned, candidates.rows, calm, candidates.threshold, plan, seed=seed, track=track)
        if causal.causal:
            fix = Fix(
                interventions=causal.interventions,
                words=causal.intervention,
                d_model=pair.d_model,
                n_layers=pair.n_layers,
                model=identity["tuned"],
            )
            holding = attack_fix(pair, scanned, candidates.rows, calm, causal, fix, plan, seed=seed, track=track)
    rungs = ladder(
        clean,
        scanned,
        fit,
        calibrate,
        named,
        candidates.rows,
        site=causal.site if causal else scanned.sites[-1],
        fpr=fpr,
        seed=seed,
    )
    found = Audit(
        base=checkpoints[0],
        tuned=checkpoints[1],
        plan=plan,
        fpr=fpr,
        seed=seed,
        files=files,
        weights=weights,
        pair=pair,
        clean=clean,
        aside=aside,
        traffic=scanned,
        traffic_name=traffic.name if traffic else "bundled benign prompts",
        candidates=candidates,
        causal=causal,
        holding=holding,
        rungs=rungs,
        folder=run.path,
        seconds=time.monotonic() - start,
    )
    if found.fix is not None and fix is not None:
        fix.save(found.fix)
    run.write_text("scores.jsonl", _scores(found))
    run.log({"seconds": found.seconds, "peak_rss_mb": found.peak_rss_mb, "candidates": len(candidates.rows)})
    return found


def _scans(
    pair: ModelPair, rows: Sequence[Example], plan: Plan, units: Units, identity: Mapping[str, str], track: Track
) -> tuple[Scan, Scan]:
    sites = plan.sites(pair.n_layers)
    clean = benign_prompts(plan.clean_prompts, seed=CLEAN_SEED)
    done = [
        scan(
            pair,
            examples,
            sites=sites,
            max_new_tokens=plan.max_new_tokens,
            units=units,
            identity=identity,
            track=track,
            what=what,
        )
        for examples, what in ((clean, "scanning clean prompts"), (rows, "scanning traffic"))
    ]
    return done[0], done[1]


def _clean_splits(rows: Sequence[int], seed: int) -> tuple[Fit[int], Calibrate[int]]:
    order = Random(seed).sample(rows, len(rows))
    cut = round(len(rows) * FIT_SHARE)
    return Fit(tuple(order[:cut])), Calibrate(tuple(order[cut:]))


def _directions_by_site(weights: WeightComparison, sites: Sequence[Site]) -> dict[Site, Float[Tensor, "k d_model"]]:
    named = {site: [d.vector for d in weights.directions_at(site)] for site in sites}
    return {site: torch.stack(vectors) for site, vectors in named.items() if vectors}


def _scores(found: Audit) -> str:
    """One line per row of the traffic: what every reader of the run may want to sort by."""
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
