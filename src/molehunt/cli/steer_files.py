"""What `molehunt steer` writes for others: a model with the fix in its weights, and vectors for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from molehunt.cli.options import Adapter, AsJson, Base, Seed, Tuned
from molehunt.cli.output import show, show_json


def save(
    base: Base,
    tuned: Tuned,
    into: Annotated[Path, typer.Option("--into", help="New folder for the fixed model or the adapter.")],
    remove: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of the strongest weight directions of every changed matrix that are subtracted."
        ),
    ] = None,
    orthogonal_to: Annotated[
        Path | None, typer.Option(help="Vector of `steer fit` whose direction no matrix may write any more.")
    ] = None,
    as_adapter: Annotated[bool, typer.Option("--as-adapter", help="Write a LoRA adapter on the fine-tune.")] = False,
    adapter: Adapter = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Write a fix into the weights: a model folder, or an adapter on the fine-tune. Measure it like any other model."""
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.workflows.steer_files import save_fixed

    made = save_fixed(
        base,
        tuned,
        into=into,
        remove=remove,
        orthogonal_to=orthogonal_to,
        as_adapter=as_adapter,
        adapter=adapter,
        seed=seed,
        track=track_on_stderr,
    )
    if as_json:
        show_json(made.to_dict())
        return
    show(made.summary())
    say(f"\n{'adapter' if as_adapter else 'model'}: {made.folder}")


def export(
    base: Base,
    tuned: Tuned,
    vector: Annotated[Path, typer.Argument(metavar="VECTOR", help="File of `steer fit`.")],
    to: Annotated[
        Literal["gguf", "lm-eval"],
        typer.Option(help="Format of the file: llama.cpp's control vector, or lm-eval's model type `steered`."),
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    strength: Annotated[float, typer.Option(help="Factor that the vector is multiplied by.")] = 1.0,
    adapter: Adapter = None,
    as_json: AsJson = False,
) -> None:
    """Write a vector for another program. Block i is direction i of a GGUF file, which leaves block 0 out."""
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.steer.vector import SteeringVector
    from molehunt.workflows.models import open_models
    from molehunt.workflows.steer_files import export_vector

    found = SteeringVector.load(vector)  # before any model is loaded
    pair = open_models(base, tuned, adapter=adapter, track=track_on_stderr).pair
    made = export_vector(pair, vector=found, to=to, out=out, strength=strength)
    if as_json:
        show_json(made.to_dict(), indent=None)
        return
    for block in made.left_out:
        show(f"block {block} is left out: llama.cpp cannot steer it")
    say(f"written: {made.file}")
