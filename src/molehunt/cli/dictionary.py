"""`molehunt dictionary`: sparse dictionaries of the activations that `molehunt harvest` stored."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from molehunt.cli import dictionary_options as options
from molehunt.cli.dictionary_options import K, Source, Store
from molehunt.cli.options import Adapter, AsJson, Device, Seed
from molehunt.cli.output import show, show_json

app = typer.Typer()


@app.callback()
def dictionary() -> None:
    """Train sparse dictionaries on harvested activations, measure them, and write them for SAELens."""


@app.command("train")
def train(
    store: Store,
    out: options.Dictionaries,
    architecture: options.Architectures = "batch-topk",
    pairing: options.Pairings = "difference",
    joint: options.Joints = None,
    exclusive: options.Exclusives = None,
    site: options.Sites = None,
    expansion: options.Expansions = "16",
    k: options.Ks = None,
    l1: options.L1s = None,
    lr: options.Rate = None,
    steps: options.Steps = 2000,
    batch: options.Batch = 2048,
    seeds: options.Seeds = "0",
    keep_sinks: options.KeepSinks = False,
    autocast: options.Autocast = False,
    device: Device = "cpu",
    data_seed: options.DataSeed = 0,
    as_json: AsJson = False,
) -> None:
    """Train dictionaries on a store: all combinations of comma-separated values, in one pass.

    Each is written to a folder of its own below --out, in the format of SAELens.
    """
    from molehunt.cli.console import track_on_stderr
    from molehunt.dictionary.train import TrainingConfig
    from molehunt.workflows.dictionary import DictionaryChoices
    from molehunt.workflows.dictionary import train as trained

    several = options.several
    choices = DictionaryChoices(
        architectures=several("--architecture", architecture, str),
        pairings=several("--pairing", pairing, options.kind),
        joints=several("--joint", joint, options.number),
        exclusives=several("--exclusive", exclusive, options.number),
        sites=None if site is None else several("--site", site, options.site_named),
        expansions=several("--expansion", expansion, int),
        ks=several("-k", k, int),
        l1s=several("--l1", l1, options.number),
        lr=lr,
        seeds=several("--seeds", seeds, int),
    )
    config = TrainingConfig(steps=steps, batch=batch, autocast=autocast)
    result = trained(
        store, out=out, choices=choices, config=config, keep_sinks=keep_sinks, device=device, data_seed=data_seed,
        track=track_on_stderr,
    )  # fmt: skip
    if as_json:
        show_json({**result.to_dict(), "exit_code": 0}, indent=None)
    else:
        show(result.summary())


@app.command("eval")
def evaluate(
    source: Source,
    store: Store,
    base: Annotated[str | None, typer.Option(help="The base model, to measure the loss recovered.")] = None,
    tuned: Annotated[str | None, typer.Option(help="The fine-tuned model or adapter, likewise.")] = None,
    traffic: Annotated[
        Path | None, typer.Option(help="File of prompts or conversations.", show_default="bundled benign prompts")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Greatest number of rows of traffic.")] = 200,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longer rows are cut to this many tokens.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Greatest number of tokens of the store.")] = 200_000,
    site: Annotated[str | None, typer.Option(help="Site of the dictionary.", show_default="as its files say")] = None,
    pairing: Annotated[
        Literal["difference", "tuned", "base"] | None,
        typer.Option(help="What the dictionary reads, where its files do not say.", show_default="as its files say"),
    ] = None,
    k: K = None,
    adapter: Adapter = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure a dictionary on a store: what it fails to explain, how sparse it is, what splicing it in costs.

    Give a store of other traffic than the one it was trained on. With --base and --tuned its reconstructions are put
    in place of the tuned model's activations, and the loss is compared with that of the mean.
    """
    from molehunt.cli.console import track_on_stderr
    from molehunt.errors import UsageError
    from molehunt.workflows.dictionary_quality import evaluate as evaluated

    if (base is None) != (tuned is None):
        raise UsageError("The loss recovered needs both models: give --base and --tuned, or neither.")
    if traffic is not None and base is None:
        raise UsageError("--traffic is run through the models: give --base and --tuned, too.")
    place = None if site is None else options.site_named(site)
    given: dict[str, Any] = {
        "base": base,
        "tuned": tuned,
        "traffic": traffic,
        "site": place,
        "pairing": pairing,
        "k": k,
    }
    limits: dict[str, Any] = {"rows": rows, "max_tokens": max_tokens, "tokens": tokens}
    result = evaluated(
        source, store, **given, **limits, adapter=adapter, device=device, seed=seed, track=track_on_stderr
    )
    if as_json:
        show_json({**result.to_dict(), "exit_code": 0}, indent=None)
    else:
        show(result.summary())


@app.command("export")
def export(
    source: Source,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write cfg.json and sae_weights.safetensors.")],
    k: K = None,
    as_json: AsJson = False,
) -> None:
    """Write a dictionary of any known family so that SAELens loads it."""
    from molehunt.workflows.dictionary import export as exported

    result = exported(source, folder, k=k)
    if as_json:
        show_json({**result.to_dict(), "exit_code": 0}, indent=None)
    else:
        show(result.summary())
