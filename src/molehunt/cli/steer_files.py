"""What `molehunt steer` writes for others: a model with the fix in its weights, and vectors for other programs."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from molehunt.cli.options import Adapter, AsJson, Base, Seed, Tuned
from molehunt.cli.tuned_side import checkpoint_of, hash_of, open_pair


def save(
    base: Base,
    tuned: Tuned,
    into: Annotated[Path, typer.Option("--into", help="New folder for the fixed model or the adapter.")],
    remove: Annotated[
        int | None,
        typer.Option(min=1, help="Take this many of the strongest weight directions of every changed matrix back."),
    ] = None,
    orthogonal_to: Annotated[
        Path | None, typer.Option(help="Vector that no matrix may write any more: fitted by `steer fit`.")
    ] = None,
    as_adapter: Annotated[bool, typer.Option("--as-adapter", help="Write a LoRA adapter on the fine-tune.")] = False,
    adapter: Adapter = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Write a fix into the weights: a model folder, or an adapter on the fine-tune. Measure it like any other model."""
    import json

    import torch

    from molehunt.audit.weights import compare_weights
    from molehunt.checkpoint.reader import Checkpoint
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.errors import UsageError
    from molehunt.model.loading import local_folder
    from molehunt.steer.saved_model import write_adapter, write_model
    from molehunt.steer.vector import SteeringVector
    from molehunt.steer.weight_edit import orthogonalisation, subtraction

    if (remove is None) == (orthogonal_to is None):
        raise UsageError("Give --remove K or --orthogonal-to VECTOR, one of the two.")
    model = checkpoint_of(tuned, adapter)
    if orthogonal_to is not None:
        vectors = SteeringVector.load(orthogonal_to, model=model.content_hash()).vectors
        edits = orthogonalisation(model, torch.stack([vectors[layer] for layer in sorted(vectors)]))
    else:
        before = Checkpoint.open(local_folder(base))
        found = compare_weights(before, model, k=remove or 1, seed=seed, track=track_on_stderr)
        edits = subtraction(model, [one.directions for one in found.matrices if one.directions is not None])
    made = (write_adapter if as_adapter else write_model)(model, edits, into, track=track_on_stderr)
    if as_json:
        typer.echo(json.dumps({"folder": str(made.folder), "edited": made.edited, "rounding": made.rounding}, indent=2))
        return
    typer.echo(f"{len(made.edited)} matrices edited; rounding took at most {made.rounding:.2g} of a change back")
    say(f"\n{'adapter' if as_adapter else 'model'}: {made.folder}")


def export(
    base: Base,
    tuned: Tuned,
    vector: Annotated[Path, typer.Argument(metavar="VECTOR", help="File of `steer fit`.")],
    to: Annotated[Literal["gguf", "lm-eval"], typer.Option(help="llama.cpp's control vector, or lm-eval's `steered`.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    strength: Annotated[float, typer.Option(help="Multiplies the vector.")] = 1.0,
    adapter: Adapter = None,
    as_json: AsJson = False,
) -> None:
    """Write a vector for another program. Molehunt's own block i is direction i of a GGUF file, which leaves block 0 out."""
    import json

    from molehunt.cli.console import say
    from molehunt.model.blocks import unwrapped
    from molehunt.steer.export_gguf import write_gguf
    from molehunt.steer.export_lm_eval import write_lm_eval
    from molehunt.steer.vector import SteeringVector

    found = strength * SteeringVector.load(vector, model=hash_of(tuned, adapter))
    pair = open_pair(base, tuned, adapter, "cpu")
    left_out: tuple[int, ...] = ()
    with pair.tuned_model() as model:
        if to == "gguf":
            config: Any = unwrapped(model).config
            hint = str(config.model_type)
            left_out = write_gguf(found, out, model_hint=hint).left_out
        else:
            write_lm_eval(found, model, out)
    if as_json:
        typer.echo(json.dumps({"file": str(out), "left_out": left_out}))
        return
    for block in left_out:
        typer.echo(f"block {block} is left out: llama.cpp cannot steer it")
    say(f"written: {out}")
