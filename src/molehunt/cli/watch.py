"""`molehunt watch`: judge every row of a log at a chosen false-alarm rate, or as published."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from molehunt.cli.options import Adapter, AsJson, Base, Clean, CleanRows, Device, Fpr, NoText, Seed, TrustClean, Tuned

if TYPE_CHECKING:
    from molehunt.watch.label_endpoint import LabelEndpoint

OUT = Path("watch")
KEY = "OPENAI_API_KEY"


def watch(
    base: Base,
    tuned: Tuned,
    traffic: Annotated[
        Path, typer.Option(help="Log to watch: JSONL, JSONL.gz or parquet, of any size.", show_default=False)
    ],
    clean: Clean = None,
    clean_rows: CleanRows = 2000,
    mode: Annotated[
        Literal["conformal", "published"],
        typer.Option(
            help="conformal holds --fpr; published is WeightWatch's range of cosines, which takes in every row and sets no "
            "rate."
        ),
    ] = "conformal",
    fpr: Fpr = 0.01,
    trust_clean: TrustClean = False,
    percentile: Annotated[
        float | None,
        typer.Option(
            min=0, max=0.49, help="Published: share of rows left out at each end of a range.", show_default="0"
        ),
    ] = None,
    slack: Annotated[
        float | None,
        typer.Option(min=0, max=2, help="Published: cosine by which a range may be left.", show_default="0.01"),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate for a row whose answer was not logged.")
    ] = 32,
    attacks: Annotated[
        Path | None,
        typer.Option(
            help="Simulate: insert these rows into the traffic, taken as benign, and tell what is seen of the 1st, 10th, "
            "100th repeat, beside the published range.",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each attack of a simulation comes.")] = 100,
    label_with: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help=f"Label directions by the model behind this OpenAI-compatible URL (key from ${KEY}): it is sent rows of "
            "the log.",
            show_default="words that stand out, offline",
        ),
    ] = None,
    label_model: Annotated[str | None, typer.Option(help="Name of the model that labels.", show_default=False)] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip and count rows that cannot be read.")] = False,
    no_text: NoText = False,
    shard: Annotated[str, typer.Option("--shard", help="This machine's share of the rows, such as 3/64.")] = "1/1",
    adapter: Adapter = None,
    device: Device = "cpu",
    out: Annotated[
        Path, typer.Option("--out", help="Folder for state, verdicts, alerts and page; a watch resumes there.")
    ] = OUT,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Watch a log along the weight directions of a fine-tune, at a false-alarm rate that you choose.

    Calibrates on clean rows first. Flagged rows are quarantined in alerts.sqlite; verdicts.jsonl has a line for every row,
    and watch.html shows what was found. Exit code 1: something was flagged. A log of n clean rows will have about n times
    the rate of those.
    """
    import json
    from dataclasses import asdict

    from molehunt.cli.watch_modes import Asked
    from molehunt.errors import UsageError
    from molehunt.report.watch_page import render_watch
    from molehunt.report.watch_told import simulation_text, to_text
    from molehunt.run.local import Shard
    from molehunt.run.whole import write_whole
    from molehunt.traffic.stream import BadLines
    from molehunt.watch.ranges import SLACK

    if not traffic.is_file():
        raise UsageError(f"{traffic} is not a file; --traffic takes a JSONL, JSONL.gz or parquet log.")
    if mode == "conformal" and (percentile, slack) != (None, None):
        raise UsageError("--percentile and --slack belong to --mode published; the other mode sets its rate by --fpr.")
    if mode == "published" and trust_clean:
        raise UsageError("--trust-clean belongs to the mode with a rate: the published one takes every row in.")
    if mode == "published" and attacks is not None:
        raise UsageError("--attacks shows the published range beside the other mode: leave --mode out.")
    asked = Asked(
        base=base,
        tuned=tuned,
        traffic=traffic,
        clean=clean,
        clean_rows=clean_rows,
        fpr=fpr,
        trust_clean=trust_clean,
        max_new_tokens=max_new_tokens,
        skip_bad=skip_bad,
        no_text=no_text,
        share=Shard.parse(shard),
        adapter=adapter,
        device=device,
        out=out,
        seed=seed,
        endpoint=_endpoint(label_with, label_model, no_text=no_text),
    )
    if attacks is not None:
        found = asked.simulated(attacks, repeats)
        typer.echo(json.dumps([asdict(one) for one in found], indent=2) if as_json else simulation_text(found, fpr))
        return
    bad = BadLines()
    if mode == "published":
        report = asked.published(bad, slack=SLACK if slack is None else slack, percentile=percentile or 0.0)
    else:
        report = asked.conformal(bad)
    page = write_whole(out / "watch.html", render_watch(report))
    if as_json:
        typer.echo(json.dumps({**report.to_json(), "report": str(page)}, indent=2))
    else:
        typer.echo(to_text(report, bad.first))
    raise typer.Exit(report.exit_code)


def _endpoint(url: str | None, model: str | None, *, no_text: bool) -> "LabelEndpoint | None":
    """Refused now rather than after hours."""
    import os

    from molehunt.errors import UsageError
    from molehunt.watch.label_endpoint import LabelEndpoint

    if url is None and model is None:
        return None
    if url is None or model is None:
        raise UsageError("--label-with URL and --label-model NAME go together.")
    if no_text:
        raise UsageError("--no-text and --label-with say opposite things: labels are made of rows' text.")
    return LabelEndpoint(url=url, model=model, key=os.environ.get(KEY) or None)
