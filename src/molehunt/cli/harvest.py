"""`molehunt harvest`: activations of both models, stored on disk for training and transfer."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from molehunt.cli.options import Adapter, AsJson, Base, Device, Seed, Tuned
from molehunt.cli.output import show, show_json
from molehunt.errors import UsageError
from molehunt.site import Site

TrafficFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="File of prompts or conversations (JSONL, JSON, CSV, parquet; - for stdin).",
        show_default="bundled benign prompts with answers",
    ),
]


def harvest(
    base: Base,
    tuned: Tuned,
    sites: Annotated[str, typer.Option(help="Where to read, such as L2.resid,L3.resid.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="Folder of the store; a harvest that was interrupted is resumed.", show_default=False
        ),
    ],
    traffic: TrafficFile = None,
    rows: Annotated[int, typer.Option(min=1, help="Greatest number of rows of traffic that are read.")] = 10_000,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longer rows are cut to this many tokens.")] = 512,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Greatest number of tokens in one file.")] = 16_384,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="The dtype in which activations are stored.")
    ] = "bfloat16",
    delta_int8: Annotated[
        bool, typer.Option("--delta-int8", help="Store only the difference of the two, as int8: a quarter of the size.")
    ] = False,
    adapter: Adapter = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Store both models' activations on the same tokens in a folder, for dictionaries and maps."""
    from molehunt.cli.console import track_on_stderr
    from molehunt.run.progress import busy

    places = _sites(sites)
    with busy(track_on_stderr, "starting"):  # torch and transformers alone take seconds
        from molehunt.workflows.harvest import harvest as harvested

    result = harvested(
        base,
        tuned,
        sites=places,
        out=out,
        traffic=traffic,
        rows=rows,
        max_tokens=max_tokens,
        shard_tokens=shard_tokens,
        dtype=dtype,
        delta_int8=delta_int8,
        adapter=adapter,
        device=device,
        seed=seed,
        track=track_on_stderr,
    )
    if as_json:
        show_json({**result.to_dict(), "exit_code": 0}, indent=None)
    else:
        show(result.summary())


def _sites(text: str) -> list[Site]:
    """The sites of a list such as `L2.resid,L3.resid`. Raises UsageError for any other text."""
    try:
        return [Site.parse(site.strip()) for site in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--sites: {error}") from None
