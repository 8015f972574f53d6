"""`molehunt watch`: judge every row of a log at a chosen false-alarm rate, or as published."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from molehunt.cli.options import Adapter, AsJson, Base, Clean, CleanRows, Device, Fpr, NoText, Seed, TrustClean, Tuned
from molehunt.cli.output import show, show_json

OUT = Path("watch")
KEY = "OPENAI_API_KEY"

Traffic: TypeAlias = Annotated[
    Path, typer.Option(help="Log to watch, of any size: JSONL, JSON, CSV or parquet; - for stdin.", show_default=False)
]
WatchMode: TypeAlias = Annotated[
    Literal["conformal", "published"],
    typer.Option(
        help="conformal keeps the rate of --fpr. published is WeightWatch's range of cosines, which takes in every row "
        "and sets no rate."
    ),
]
Percentile: TypeAlias = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=0.49,
        help="With --mode published: share of the rows that are left out at each end of a range.",
        show_default="0",
    ),
]
Slack: TypeAlias = Annotated[
    float | None,
    typer.Option(min=0, max=2, help="With --mode published: cosine by which a range may be left.", show_default="0.01"),
]
MaxNewTokens: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Number of tokens that are generated for a row whose answer was not logged.")
]
Attacks: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="Simulate: insert these rows into the traffic, which is taken as benign, and report what is flagged of "
        "their 1st, 10th and 100th repeat, beside the published range.",
        show_default=False,
    ),
]
Repeats: TypeAlias = Annotated[int, typer.Option(min=1, help="Number of times that a simulation inserts each attack.")]
LabelWith: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help=f"Label directions by the model behind this OpenAI-compatible URL, with the key in ${KEY}. Rows of the log "
        "are sent to it.",
        show_default="words that stand out, offline",
    ),
]
LabelModel: TypeAlias = Annotated[str | None, typer.Option(help="Name of the labelling model.", show_default=False)]
SkipBad: TypeAlias = Annotated[bool, typer.Option("--skip-bad", help="Skip and count rows that cannot be read.")]
ShardOption: TypeAlias = Annotated[
    str, typer.Option("--shard", help="Share of the rows that this machine reads, such as 3/64.")
]
Out: TypeAlias = Annotated[
    Path,
    typer.Option("--out", help="Folder for state, verdicts, alerts and page. A watch resumes in its folder."),
]


def watch(
    base: Base,
    tuned: Tuned,
    traffic: Traffic,
    clean: Clean = None,
    clean_rows: CleanRows = 2000,
    mode: WatchMode = "conformal",
    fpr: Fpr = 0.01,
    trust_clean: TrustClean = False,
    percentile: Percentile = None,
    slack: Slack = None,
    max_new_tokens: MaxNewTokens = 32,
    attacks: Attacks = None,
    repeats: Repeats = 100,
    label_with: LabelWith = None,
    label_model: LabelModel = None,
    skip_bad: SkipBad = False,
    no_text: NoText = False,
    shard: ShardOption = "1/1",
    adapter: Adapter = None,
    device: Device = "cpu",
    out: Out = OUT,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Watch a log along the weight directions of a fine-tune, at a false-alarm rate that you choose.

    Calibrates on clean rows first. Flagged rows are quarantined in alerts.sqlite. verdicts.jsonl has a line for every row,
    and watch.html shows what was found. Exit code 1 means that something was flagged. In a log of n clean rows, about n
    times the rate are flagged.
    """
    from molehunt.cli.console import track_on_stderr
    from molehunt.run.local import WorkShard
    from molehunt.workflows.watch import PAGE, run_watch
    from molehunt.workflows.watch_options import WatchOptions, label_endpoint
    from molehunt.workflows.watch_simulation import simulate_attacks

    options = WatchOptions(
        traffic=traffic, clean=clean, clean_rows=clean_rows, mode=mode, fpr=fpr, trust_clean=trust_clean,
        percentile=percentile, slack=slack, max_new_tokens=max_new_tokens, labels=label_endpoint(label_with, label_model),
        skip_bad=skip_bad, no_text=no_text, shard=WorkShard.parse(shard), adapter=adapter, device=device, out=out,
        seed=seed, attacks=attacks, repeats=repeats,
    )  # fmt: skip
    if attacks is not None:
        found = simulate_attacks(base, tuned, options, track=track_on_stderr)
        if as_json:
            show_json(found.to_dict()["monitors"])
        else:
            show(found.summary())
        return
    result = run_watch(base, tuned, options, track=track_on_stderr)
    if as_json:
        show_json({**result.to_dict(), "report": str(out / PAGE)})
    else:
        show(result.summary())
    raise typer.Exit(result.report.exit_code)
