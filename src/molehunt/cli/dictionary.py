"""`molehunt dictionary`: sparse dictionaries of the activations that `molehunt harvest` kept."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from molehunt.cli.options import AsJson, Seed
from molehunt.errors import UsageError, printable

if TYPE_CHECKING:
    from molehunt.activation.shuffle import PairBatch
    from molehunt.activation.store import ActivationStore
    from molehunt.dictionary.dictionary import Dictionary
    from molehunt.dictionary.quality import Quality
    from molehunt.model.pair import ModelPair
    from molehunt.site import Site

T = TypeVar("T")
KINDS = {"difference": "difference", "crosscoder": "both", "tuned": "tuned", "base": "base"}
"""What is typed → what the code calls it."""
BUFFER_TOKENS = 2**17
"""Tokens that are mixed with each other on their way out of a store."""
EVAL_BATCH = 1024
"""Tokens encoded at once; their codes are held in full."""
DONE, CHECKPOINT = "dictionaries.json", "checkpoint.safetensors"

Store = Annotated[Path, typer.Argument(metavar="STORE", help="Folder that `molehunt harvest` made.")]
Dict = Annotated[Path, typer.Argument(metavar="DICT", help="Folder of a dictionary of any known family.")]
K = Annotated[
    int | None, typer.Option("-k", min=1, help="Latents that fire, where the files of Qwen Scope do not say.")
]

app = typer.Typer()


@app.callback()
def dictionary() -> None:
    """Train sparse dictionaries on harvested activations, measure them, and write them for SAELens."""


@app.command("train")
def train(
    store: Store,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the dictionaries; a training that was interrupted is resumed.")
    ],
    architecture: Annotated[
        str, typer.Option(help="One or more of batch-topk, topk, relu, gated, jumprelu, matryoshka.")
    ] = "batch-topk",
    pairing: Annotated[str, typer.Option(help="One or more of difference, crosscoder, tuned, base.")] = "difference",
    joint: Annotated[
        str | None, typer.Option(help="Of crosscoders: from 0, both models' errors, to -1, the difference's.")
    ] = None,
    exclusive: Annotated[
        str | None, typer.Option(help="Of crosscoders: share of latents that belong to each model alone.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Such as L6.resid.", show_default="all sites of the store")] = None,
    expansion: Annotated[str, typer.Option(help="Latents per dimension of the model.")] = "16",
    k: Annotated[
        str | None, typer.Option("-k", help="Latents a token; the target of jumprelu.", show_default="32")
    ] = None,
    l1: Annotated[
        str | None, typer.Option(help="Weight of the penalty of relu and gated.", show_default="0.02")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Peak learning rate.", show_default="by width")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 2000,
    batch: Annotated[int, typer.Option(min=2, help="Tokens a step.")] = 2048,
    seeds: Annotated[str, typer.Option(help="Of the start.")] = "0",
    keep_sinks: Annotated[bool, typer.Option("--keep-sinks", help="Train on attention sinks, too.")] = False,
    autocast: Annotated[bool, typer.Option("--autocast", help="Dense products in bf16.")] = False,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1 …")] = "cpu",
    data_seed: Annotated[int, typer.Option(min=0, help="Of the order of tokens.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train dictionaries on a store: all combinations of comma-separated values, in one pass.

    Each is written to a folder of its own below --out, in the format of SAELens.
    """
    import json

    from molehunt.activation.manifest import MANIFEST
    from molehunt.activation.shuffle import batches
    from molehunt.activation.store import ActivationStore
    from molehunt.cli.console import track_on_stderr
    from molehunt.dictionary.formats.sae_lens import FILES, save_dictionary
    from molehunt.dictionary.grid import grid
    from molehunt.dictionary.train import TrainingConfig, train_dictionaries
    from molehunt.run.folder import RunFolder
    from molehunt.run.unit import file_hash

    opened = ActivationStore.open(store)
    sites = opened.sites if site is None else _several("--site", site, _site)
    for place in sites:
        _in_store(place, opened)
    specs = grid(
        d_model=opened.d_model,
        sites=sites,
        architectures=_several("--architecture", architecture, str),
        pairings=_several("--pairing", pairing, _kind),
        joints=_several("--joint", joint, _number),
        exclusives=_several("--exclusive", exclusive, _number),
        expansions=_several("--expansion", expansion, int),
        ks=_several("-k", k, int),
        l1s=_several("--l1", l1, _number),
        lr=lr,
        seeds=_several("--seeds", seeds, int),
    )
    differences = opened.manifest.delta_int8
    if differences and any(spec.pairing.kind != "difference" for spec in specs):
        raise UsageError("This store holds differences alone (--delta-int8); --pairing difference reads them.")
    for spec in specs:
        spec.build(opened.d_model)  # what cannot be built leaves no folder behind
    config = TrainingConfig(steps=steps, batch=batch, autocast=autocast)
    settings = {
        "command": "dictionary train",
        "specs": [spec.to_json() for spec in specs],
        "steps": steps,
        "batch": batch,
        "autocast": autocast,
        "keep_sinks": keep_sinks,
        "data_seed": data_seed,
        "inputs": {"store": file_hash(opened.path / MANIFEST)},
    }
    run = RunFolder.create(out, settings)

    def following(place: "Site") -> "Callable[[int], Any]":
        return lambda skip: batches(
            opened,
            place,
            size=batch,
            seed=data_seed,
            buffer_tokens=max(batch, BUFFER_TOKENS),
            drop_sinks=not keep_sinks,
            skip=skip,
            delta_only=differences,
        )

    finished = (run.path / DONE).is_file() and all((out / s.name / file).is_file() for s in specs for file in FILES)
    if not finished:
        trained = train_dictionaries(
            specs,
            {place: following(place) for place in sites},
            config,
            d_model=opened.d_model,
            device=device,
            checkpoint=run.path / CHECKPOINT,
            track=track_on_stderr,
        )
        told: list[dict[str, Any]] = []
        for one in trained:
            save_dictionary(one.dictionary, out / one.spec.name)
            run.write_json(f"{one.spec.name}/history.json", list(one.history))
            last = one.history[-1]
            sparse = {name: last[name] for name in ("reconstruction", "l0", "dead")}
            told.append({"name": one.spec.name, **one.spec.to_json(), "d_dict": one.dictionary.d_dict, **sparse})
        used = opened.tokens if keep_sinks else opened.tokens - opened.manifest.sinks
        run.write_json(DONE, {"dictionaries": told, "tokens": steps * batch, "epochs": steps * batch / used})
        run.write_env()
    result = json.loads((run.path / DONE).read_text())
    if as_json:
        typer.echo(json.dumps({**result, "exit_code": 0}))
        return
    rows = result["dictionaries"]
    typer.echo(f"TRAINED {len(rows)} on {result['tokens']} tokens each, {result['epochs']:.2g} times the store's")
    typer.echo(f"{'unexplained':>11} {'latents/token':>13} {'dead':>6}  folder")
    for row in rows:
        typer.echo(f"{row['reconstruction']:>11.4f} {row['l0']:>13.2f} {row['dead']:>6.1%}  {out / row['name']}")


@app.command("eval")
def evaluate(
    source: Dict,
    store: Store,
    base: Annotated[str | None, typer.Option(help="The base model, to measure the loss recovered.")] = None,
    tuned: Annotated[str | None, typer.Option(help="The fine-tuned model or adapter, likewise.")] = None,
    traffic: Annotated[
        Path | None, typer.Option(help="JSONL or parquet of prompts.", show_default="bundled benign prompts")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of traffic at most.")] = 200,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longer rows are cut to this many tokens.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the store at most.")] = 200_000,
    site: Annotated[str | None, typer.Option(help="Where the dictionary belongs.", show_default="as it says")] = None,
    pairing: Annotated[
        Literal["difference", "tuned", "base"] | None,
        typer.Option(help="What it reads, where its files do not say.", show_default="as it says"),
    ] = None,
    k: K = None,
    adapter: Annotated[
        bool | None,
        typer.Option("--adapter/--no-adapter", help="For a folder with weights and an adapter: apply it or not."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1 …")] = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure a dictionary on a store: what it fails to explain, how sparse it is, what splicing it in costs.

    Give a store of other traffic than the one it was trained on. With --base and --tuned its reconstructions are put
    in place of the tuned model's activations, and the loss is compared with that of the mean.
    """
    import json
    from dataclasses import replace

    import torch

    from molehunt.activation.store import ActivationStore
    from molehunt.cli.console import track_on_stderr
    from molehunt.dictionary.formats.detect import load_dictionary
    from molehunt.dictionary.latents import latent_scaling, norm_bins, relative_norms
    from molehunt.dictionary.pairing import Pairing
    from molehunt.dictionary.quality import measure_quality

    if (base is None) != (tuned is None):
        raise UsageError("The loss recovered needs both models: give --base and --tuned, or neither.")
    if traffic is not None and base is None:
        raise UsageError("--traffic is run through the models: give --base and --tuned, too.")
    opened = ActivationStore.open(store)
    found = load_dictionary(source, d_model=opened.d_model, k=k).to(device)
    if pairing is not None and found.pairing.kind == "both":
        raise UsageError("This dictionary is a crosscoder; --pairing says something of other ones.")
    found = found if pairing is None else replace(found, pairing=Pairing(kind=pairing))
    place = found.site if site is None else _site(site)
    if place is None:
        raise UsageError(f"The dictionary does not say its site. Give --site: {', '.join(map(str, opened.sites))}.")
    _in_store(place, opened)
    chosen = _chosen_batches(opened, place, found, tokens, seed)
    models, ids = None, []
    if base is not None and tuned is not None:
        models, ids = _models(base, tuned, opened, adapter, device, traffic, rows, max_tokens, seed)
    measured = measure_quality(found, chosen(), pair=models, rows=ids, site=place, track=track_on_stderr)
    told: dict[str, Any] = {
        "site": str(place),
        "pairing": found.pairing.to_json(),
        "d_in": found.d_in,
        "d_dict": found.d_dict,
        **measured.to_json(),
    }
    if found.pairing.kind == "both":
        relative = relative_norms(found)
        scaling = latent_scaling(found, chosen(), track=track_on_stderr)
        low = (relative > 0.9) & scaling.tuned_only()
        told["latents"] = {**norm_bins(relative), "tuned_confirmed": int(torch.count_nonzero(low))}
    typer.echo(json.dumps({**told, "exit_code": 0}) if as_json else _table(told, measured))


@app.command("export")
def export(
    source: Dict,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write cfg.json and sae_weights.safetensors.")],
    k: K = None,
    as_json: AsJson = False,
) -> None:
    """Write a dictionary of any known family so that SAELens loads it."""
    import json

    from molehunt.dictionary.formats.detect import load_dictionary
    from molehunt.dictionary.formats.sae_lens import CONFIG, FILES, save_dictionary

    found = load_dictionary(source, k=k)
    if folder.resolve() == source.resolve():
        raise UsageError("A dictionary is not written over itself. Give another DIR.")
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - set(FILES)):
        raise UsageError(f"{printable(str(folder))} holds something else. Give an empty or a new DIR.")
    save_dictionary(found, folder)
    kind = json.loads((folder / CONFIG).read_text())["architecture"]
    if as_json:
        told = {"folder": str(folder), "architecture": kind, "d_in": found.d_in, "d_dict": found.d_dict}
        typer.echo(json.dumps({**told, "exit_code": 0}))
        return
    typer.echo(f"WROTE {folder}: {kind}, {found.d_dict} latents over {found.d_in} values")


def _several(option: str, text: str | None, read: Callable[[str], T]) -> list[T]:
    """Comma-separated values; none for None."""
    try:
        return [read(part.strip()) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise UsageError(f"{option}: {printable(text or '')!r} is not a list of values such as 1,2.") from None


def _number(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(text)
    return value


def _site(text: str) -> "Site":
    from molehunt.site import Site

    try:
        return Site.parse(text)
    except ValueError as error:
        raise UsageError(f"--site: {error}") from None


def _kind(text: str) -> Any:
    if text not in KINDS:
        raise UsageError(f"--pairing: one or more of {', '.join(KINDS)}, got {printable(text)!r}.")
    return KINDS[text]


def _in_store(place: "Site", store: "ActivationStore") -> None:
    if place not in store.sites:
        raise UsageError(f"{place} is not in this store, which holds {', '.join(map(str, store.sites))}.")


def _chosen_batches(
    store: "ActivationStore", place: "Site", found: "Dictionary", tokens: int, seed: int
) -> "Callable[[], list[PairBatch] | Any]":
    """A function that begins again with the same tokens, each at most once."""
    from itertools import islice

    from molehunt.activation.shuffle import batches

    differences = store.manifest.delta_int8
    if differences and found.pairing.kind != "difference":
        raise UsageError(
            f"This store holds differences alone (--delta-int8), and the dictionary reads {found.pairing.kind}."
        )
    size = min(EVAL_BATCH, tokens)
    return lambda: islice(
        batches(store, place, size=size, seed=seed, buffer_tokens=BUFFER_TOKENS, epochs=1, delta_only=differences),
        -(-tokens // size),
    )


def _models(
    base: str,
    tuned: str,
    store: "ActivationStore",
    adapter: bool | None,
    device: str,
    traffic: Path | None,
    rows: int,
    max_tokens: int,
    seed: int,
) -> "tuple[ModelPair, list[list[int]]]":
    """The pair, which must be the store's, and token ids of rows of traffic."""
    from molehunt.activation.identity import identify
    from molehunt.activation.manifest import Expected, check_expected
    from molehunt.checkpoint.reader import Checkpoint
    from molehunt.cli.tuned_side import open_pair
    from molehunt.model.loading import local_folder
    from molehunt.traffic.benign import benign_prompts
    from molehunt.traffic.chat import prompt_ids
    from molehunt.traffic.stream import read_traffic

    folders = local_folder(base), local_folder(tuned)
    before = Checkpoint.open(folders[0])
    after = Checkpoint.open(folders[1], adapter="refuse" if adapter is None else "use" if adapter else "ignore")
    pair = open_pair(*folders, adapter, device)
    theirs = identify(before, after, pair.tokenizer)
    expected = Expected(base=theirs.base, tuned=theirs.tuned, tokenizer=theirs.tokenizer)
    check_expected(store.path, store.manifest, expected)
    examples = benign_prompts(rows, seed=seed) if traffic is None else list(read_traffic(traffic, rows))
    ids = [
        prompt_ids(pair.tokenizer, e.prompt) + pair.tokenizer.encode(e.response or "", add_special_tokens=False)
        for e in examples
    ]
    return pair, [row[:max_tokens] for row in ids]


def _table(told: dict[str, Any], measured: "Quality") -> str:
    n = measured.fvu.n
    lines = [
        f"MEASURED at {told['site']} ({told['pairing']['kind']}), {told['d_dict']} latents, on {n} tokens",
        f"variance unexplained    {measured.fvu.value:.4f}",
        f"latents a token         {measured.l0.value:.2f}",
        f"latents that never fire {measured.dead.value:.1%}",
    ]
    if measured.loss is not None:
        loss, share = measured.loss, measured.loss.recovered
        what = "nothing to recover: the mean costs nothing" if share is None else f"{share:.1%}"
        lines.append(f"loss recovered          {what}, on {loss.n} tokens")
        kept = (
            "nothing to recover: the mean changes nothing" if loss.kl_recovered is None else f"{loss.kl_recovered:.1%}"
        )
        lines.append(f"predictions recovered   {kept}")
        lines.append(f"  KL, nats a token: {loss.kl_spliced:.4f} spliced, {loss.kl_reference:.4f} with the mean")
        lines.append(
            f"  nats a token: {loss.clean:.4f} as it is, {loss.spliced:.4f} spliced, {loss.reference:.4f} with the mean"
        )
    if "latents" in told:
        bins = told["latents"]
        lines.append(
            f"decoder norms: {bins['base']} base alone, {bins['shared']} shared, {bins['tuned']} tuned alone, "
            f"{bins['between']} between"
        )
        lines.append(f"  {bins['tuned_confirmed']} of the tuned model's are not needed by the base (latent scaling)")
    return "\n".join(lines)
