"""`molehunt audit`: the main job."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from molehunt.cli.options import AsJson, Base, Out, Seed, Tuned


def audit(
    base: Base,
    tuned: Tuned,
    traffic: Annotated[
        Path | None,
        typer.Option(
            help="JSONL or parquet of prompts, with or without rare bad ones; no labels needed.",
            show_default="bundled benign prompts",
        ),
    ] = None,
    plan: Annotated[Literal["quick", "full"], typer.Option(help="How much is read.")] = "quick",
    fpr: Annotated[float, typer.Option(min=1e-4, max=0.2, help="False-positive rate of the clean threshold.")] = 0.01,
    adapter: Annotated[
        bool | None,
        typer.Option("--adapter/--no-adapter", help="For a folder with weights and an adapter: apply it or not."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the models run: cpu, cuda, cuda:1 …")] = "cpu",
    out: Out = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Audit a fine-tune against its base: find what it hides, and prove it by intervention."""
    import shlex
    import sys

    from molehunt.cli.console import say, track_on_stderr
    from molehunt.run.progress import busy

    with busy(track_on_stderr, "starting"):  # torch and transformers alone take seconds
        from molehunt.audit.plan import plan_named
        from molehunt.audit.run import run_audit
        from molehunt.report.build import build_report, summary
        from molehunt.report.machine import to_json, write_report

    found = run_audit(
        base,
        tuned,
        traffic=traffic,
        plan=plan_named(plan),
        out=out,
        fpr=fpr,
        seed=seed,
        adapter=adapter,
        device=device,
        track=track_on_stderr,
    )
    command = shlex.join(["molehunt", *sys.argv[1:]])
    report = build_report(found, title=f"{found.tuned.path.name} against {found.base.path.name}", command=command)
    page = write_report(report, found.folder)
    typer.echo(to_json(report) if as_json else summary(report))
    say(f"\nreport: {page}")
    raise typer.Exit(report.verdict.exit_code)
