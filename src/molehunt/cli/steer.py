"""`molehunt steer`: switch a behaviour off: find the layer, fit a vector, set a gate, try it, write it down."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from molehunt.cli.options import (
    Adapter,
    AsJson,
    Base,
    Device,
    FixFile,
    Match,
    Negative,
    Operator,
    Positive,
    RowLimit,
    Scope,
    Seed,
    Strength,
    Tuned,
    When,
)
from molehunt.cli.output import show, show_json
from molehunt.cli.steer_capability import capability
from molehunt.cli.steer_files import export, save

app = typer.Typer()


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
        typer.Option(
            help="The same prompts with nothing there, which shows what the trigger is.",
            show_default="words that differ",
        ),
    ] = None,
    match: Match = None,
    positions: Annotated[
        bool,
        typer.Option(
            "--positions",
            help="Also patch the trigger's tokens and those behind it one at a time, to see which of them carries it.",
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Greatest number of tokens of an answer.")] = 24,
    limit: RowLimit = 200,
    adapter: Adapter = None,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option("--out", help="Folder for sweep.json and sweep.html.")] = Path("steer"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Patch the trigger's tokens at one block after the other: up to which one does that take the behaviour away?"""
    import shlex
    import sys

    from molehunt.cli.console import say, track_on_stderr
    from molehunt.workflows.models import open_models
    from molehunt.workflows.steer_fix import behaviour_judge
    from molehunt.workflows.steer_sweep import sweep

    behaviour_judge(match or ())  # before any model is loaded
    found = sweep(
        open_models(base, tuned, adapter=adapter, device=device, track=track_on_stderr).pair,
        triggered=triggered,
        contrast=contrast,
        without=without,
        match=match or (),
        positions=positions,
        max_new_tokens=max_new_tokens,
        limit=limit,
        seed=seed,
        track=track_on_stderr,
    )
    command = shlex.join(["molehunt", *sys.argv[1:]])
    page = found.save(out, title=f"{Path(tuned).name} against {Path(base).name}", command=command)
    if as_json:
        show_json(found.to_dict())
        return
    show(found.summary())
    say(f"\npage: {page}")


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
    limit: RowLimit = 1000,
    adapter: Adapter = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Fit a steering vector on prompts with and without a behaviour, at the last token of each.

    Added with strength 1, it moves a prompt without the behaviour to one with it; strength -1 does the opposite.
    """
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.workflows.models import open_models
    from molehunt.workflows.steer import steer

    pair = open_models(base, tuned, adapter=adapter, device=device, track=track_on_stderr).pair
    found = steer(
        pair,
        positive=positive,
        negative=negative,
        layer=layer or range(pair.n_layers),
        method=method,
        limit=limit,
        track=track_on_stderr,
    )
    found.vector.save(out)
    if as_json:
        fitted = found.to_dict()
        row = {"file": str(out), "method": fitted["method"], "norms": fitted["norms"]}
        show_json(row)
        return
    show(found.summary())
    say(f"\nvector: {out}")


@app.command("gate")
def gate(
    base: Base,
    tuned: Tuned,
    positive: Positive,
    negative: Annotated[
        Path, typer.Option(help="Clean prompts: half fit the probe, half set its threshold.", show_default=False)
    ],
    layer: Annotated[int, typer.Option(min=0, help="0-based block whose output is read.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="File to write, such as gate.safetensors.")],
    fpr: Annotated[float, typer.Option(min=1e-5, max=0.2, help="Share of clean prompts that may be steered.")] = 0.01,
    limit: RowLimit = 2000,
    adapter: Adapter = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit the condition under which a prompt is steered, at a false-positive rate that you choose."""
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.workflows.models import open_models
    from molehunt.workflows.steer_gate import fit_gate

    pair = open_models(base, tuned, adapter=adapter, device=device, track=track_on_stderr).pair
    found = fit_gate(
        pair, positive=positive, negative=negative, layer=layer, fpr=fpr, limit=limit, seed=seed, track=track_on_stderr
    )
    found.condition.save(out)
    if as_json:
        show_json({"file": str(out), **found.to_dict()})
        return
    show(found.summary())
    say(f"\ncondition: {out}")


@app.command("try")
def try_(
    base: Base,
    tuned: Tuned,
    fix: FixFile,
    prompts: Annotated[Path, typer.Option(help="Prompts to answer with and without the fix.", show_default=False)],
    clean: Annotated[
        Path | None,
        typer.Option(help="Prompts whose answers must stay as they are: the cost.", show_default="bundled prompts"),
    ] = None,
    match: Match = None,
    strength: Strength = None,
    operator: Operator = "add",
    scope: Scope = "all",
    when: When = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Greatest number of tokens of an answer.")] = 32,
    limit: RowLimit = 100,
    adapter: Adapter = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Answer prompts with and without a fix, and measure what it costs on clean ones."""
    from molehunt.cli.console import track_on_stderr
    from molehunt.workflows.models import open_models
    from molehunt.workflows.steer_fix import VectorOptions
    from molehunt.workflows.steer_trial import try_fix

    found = try_fix(
        open_models(base, tuned, adapter=adapter, device=device, track=track_on_stderr).pair,
        fix=fix,
        options=VectorOptions(strength=strength, operator=operator, scope=scope, when=when),
        prompts=prompts,
        clean=clean,
        match=match or None,
        max_new_tokens=max_new_tokens,
        limit=limit,
        track=track_on_stderr,
    )
    if as_json:
        show_json(found.to_dict())
    else:
        show(found.summary())


app.command("capability")(capability)
app.command("save")(save)
app.command("export")(export)
