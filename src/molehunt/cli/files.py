"""`molehunt files`: what differs between two folders, before any model is run."""

from typing import Annotated

import typer

from molehunt.cli.options import AsJson, Base, Out, Seed, Tuned
from molehunt.cli.output import show, show_json


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
    bases: Annotated[
        list[str] | None,
        typer.Option(
            "--bases",
            help="Further candidates for BASE, ranked with it: a model, or a folder of model folders. Repeat the option.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Compare two model folders, and what loaders would read from them, without running a model.

    It also says what kind of fine-tune this is, and whether BASE is the model that it was made from. Exit code 0: no
    difference changes the output, and loaders agree. 1: some difference does, or loaders disagree. 3: BASE is another
    model's base. 4: a folder is broken or refused. Nothing here is random: --seed is accepted as in every command, and
    changes nothing.
    """
    from molehunt.audit.files import compare_folders
    from molehunt.cli.console import track_on_stderr

    choice = "refuse" if adapter is None else "use" if adapter else "ignore"
    found = compare_folders(base, tuned, adapter=choice, bases=bases or (), track=track_on_stderr)
    if out is not None:
        from molehunt.run.folder import RunFolder

        inputs = {"base": found.base_sha256, "tuned": found.tuned_sha256}
        run = RunFolder.create(out, {"command": "files", "adapter": choice, "inputs": inputs})
        run.write_text("files.json", found.to_json() + "\n")
    if as_json:
        show_json(found.to_json())
    else:
        show(found.to_table())
    raise typer.Exit(found.exit_code)
