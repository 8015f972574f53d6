"""`molehunt files`: what differs between two folders, before any model is run."""

from typing import Annotated

import typer

from molehunt.cli.options import AsJson, Base, Out, Seed, Tuned


def files(
    base: Base,
    tuned: Tuned,
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
    """Compare two model folders, and what loaders would read from them, without running a model.

    Exit code 0: no difference changes the output, and loaders agree. 1: some difference does, or loaders disagree.
    3: the adapter is of a kind that is not read. 4: a folder is broken or refused. Nothing here is random: --seed is
    accepted as in every command, and changes nothing.
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
