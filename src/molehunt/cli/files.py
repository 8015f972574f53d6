"""`molehunt files`: what the folders say, before any model is run."""

from typing import Annotated

import typer

from molehunt.cli.options import AsJson, Base, Out, Seed, Tuned


def files(
    base: Base,
    tuned: Tuned,
    adapter: Annotated[
        bool | None,
        typer.Option("--adapter/--no-adapter", help="For a folder with weights and an adapter: which one is meant."),
    ] = None,
    as_json: AsJson = False,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Compare two model folders and what loaders would really load; no forward pass.

    Exit code 0: nothing that changes output or that loaders disagree on; 1: something is; 3: a kind of adapter that is
    not read; 4: a folder is broken or refused. Nothing here is random: --seed is taken for uniformity.
    """
    from molehunt.audit.files import compare_folders
    from molehunt.cli.console import track_on_stderr

    choice = "refuse" if adapter is None else "use" if adapter else "ignore"
    found = compare_folders(base, tuned, adapter=choice, track=track_on_stderr)
    if out is not None:
        from molehunt.run.folder import RunFolder

        inputs = {"base": found.base_sha256, "tuned": found.tuned_sha256}
        run = RunFolder.create(out, {"command": "files", "adapter": choice, "inputs": inputs})
        run.write_text("files.json", found.to_json() + "\n")
    typer.echo(found.to_json() if as_json else found.to_table())
    raise typer.Exit(found.exit_code)
