"""`molehunt directions`: the directions in which a fine-tune changed its weights, without running it."""

from typing import Annotated

import typer

from molehunt.cli.options import AsJson, Base, Out, Seed, Tuned
from molehunt.cli.output import show, show_json


def directions(
    base: Base,
    tuned: Tuned,
    k: Annotated[int, typer.Option("-k", min=1, max=64, help="Greatest number of directions of each matrix.")] = 8,
    all_matrices: Annotated[
        bool,
        typer.Option(
            "--all-matrices", help="List directions of q, k, v, gate and up, too, and not only of o and down."
        ),
    ] = False,
    adapter: Annotated[
        bool | None,
        typer.Option(
            "--adapter/--no-adapter",
            help="For a folder that holds full weights and an adapter: which of the two is compared.",
        ),
    ] = None,
    as_json: AsJson = False,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """List the singular directions of every changed matrix, strongest first.

    Directions alone are no evidence against a model: every fine-tune has them. Exit code 0: every matrix that changed
    could be read, or none changed. 3: every change lies under the rounding noise, or BASE is another model's base.
    4: a folder is broken.
    """
    from molehunt.audit.base_identity import check_base
    from molehunt.audit.weight_comparison import ROLES, WRITERS  # torch stays out of --help
    from molehunt.audit.weights import compare_weights
    from molehunt.checkpoint.adapter_folder import has_full_weights
    from molehunt.checkpoint.hub import local_folder
    from molehunt.checkpoint.reader import Checkpoint
    from molehunt.cli.console import track_on_stderr
    from molehunt.errors import UsageError
    from molehunt.run.folder import RunFolder

    roles = ROLES if all_matrices else WRITERS
    if adapter and has_full_weights(local_folder(tuned, track_on_stderr)):
        raise UsageError(
            "Directions are read from weights or from an adapter, not from both in one folder.\n"
            "Move the adapter (adapter_config.json and its weights) to a folder of its own, or pass --no-adapter."
        )
    before = Checkpoint.open(local_folder(base, track_on_stderr))
    after = Checkpoint.open(local_folder(tuned, track_on_stderr), adapter="refuse" if adapter is None else "ignore")
    check_base(before, after, track_on_stderr)
    run = None
    if out is not None:
        hashes = {"base": before.content_hash(), "tuned": after.content_hash()}
        config = {"command": "directions", "k": k, "roles": roles, "seed": seed, "inputs": hashes}
        run = RunFolder.create(out, config)
    found = compare_weights(
        before, after, k=k, roles=roles, seed=seed, units=run.units if run else None, track=track_on_stderr
    )
    if run is not None:
        run.write_text("directions.json", found.to_json() + "\n")
        found.save_vectors(run.path / "directions.safetensors")
        run.write_env()
    show_json(found.to_json()) if as_json else show(found.to_table())
    raise typer.Exit(found.exit_code)
