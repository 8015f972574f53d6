"""`molehunt harvest`: activations of both models, kept on disk for training and transfer."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from molehunt.cli.options import AsJson, Base, Seed, Tuned


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
    traffic: Annotated[
        Path | None,
        typer.Option(help="JSONL or parquet of prompts.", show_default="bundled benign prompts with answers"),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of traffic to read at most.")] = 10_000,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longer rows are cut to this many tokens.")] = 512,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one file at most.")] = 16_384,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="In which activations are kept.")
    ] = "bfloat16",
    delta_int8: Annotated[
        bool, typer.Option("--delta-int8", help="Keep only the difference of the two, as int8: a quarter of the size.")
    ] = False,
    adapter: Annotated[
        bool | None,
        typer.Option("--adapter/--no-adapter", help="For a folder with weights and an adapter: apply it or not."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the models run: cpu, cuda, cuda:1 …")] = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Keep both models' activations on the same tokens in a folder, for dictionaries and maps."""
    import json

    from molehunt.activation.harvest import harvest as harvested  # torch stays out of --help
    from molehunt.activation.identity import identify
    from molehunt.checkpoint.reader import Checkpoint
    from molehunt.cli.console import track_on_stderr
    from molehunt.cli.tuned_side import open_pair
    from molehunt.errors import UsageError
    from molehunt.model.loading import local_folder
    from molehunt.site import Site
    from molehunt.traffic.benign import benign_prompts
    from molehunt.traffic.chat import prompt_ids
    from molehunt.traffic.stream import read_traffic

    try:
        places = [Site.parse(site.strip()) for site in sites.split(",")]
    except ValueError as error:
        raise UsageError(f"--sites: {error}") from None
    folders = local_folder(base), local_folder(tuned)
    before = Checkpoint.open(folders[0])
    after = Checkpoint.open(folders[1], adapter="refuse" if adapter is None else "use" if adapter else "ignore")
    examples = benign_prompts(rows, seed=seed) if traffic is None else list(read_traffic(traffic, rows))
    pair = open_pair(*folders, adapter, device)
    ids = [
        (prompt_ids(pair.tokenizer, e.prompt) + pair.tokenizer.encode(e.response or "", add_special_tokens=False))[
            :max_tokens
        ]
        for e in examples
    ]
    store = harvested(
        pair,
        ids,
        sites=places,
        into=out,
        identity=identify(before, after, pair.tokenizer),
        dtype=dtype,
        delta_int8=delta_int8,
        shard_tokens=shard_tokens,
        track=track_on_stderr,
    )
    told = store.manifest
    if as_json:
        rms = {site: {side: scale.rms for side, scale in sides.items()} for site, sides in told.scale.items()}
        counts = {"documents": told.documents, "tokens": told.tokens, "sinks": told.sinks, "shards": len(told.shards)}
        typer.echo(json.dumps({**counts, "d_model": told.d_model, "rms": rms, "exit_code": 0}))
        return
    kept = "int8 differences" if told.delta_int8 else told.dtype
    typer.echo(f"HARVESTED {told.tokens} tokens of {told.documents} rows as {kept}, in {len(told.shards)} files")
    typer.echo(f"{told.sinks} of them are attention sinks, left out of what follows and of training")
    for site, sides in told.scale.items():
        typer.echo(
            f"{site}: RMS {sides['base'].rms:.4g} base, {sides['tuned'].rms:.4g} tuned, "
            f"{sides['delta'].rms:.4g} their difference"
        )
