"""`molehunt bench`: every method on organisms with known truth."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from molehunt.cli.options import AsJson
from molehunt.cli.output import show, show_json

OUT = Path("bench")
LATER = "When all shards are done, run without --shard for the tables."


def bench(
    grid: Annotated[
        str, typer.Option("--grid", help="published, core, smoke, or a YAML file of cells.", show_default=True)
    ] = "core",
    out: Annotated[
        Path, typer.Option("--out", help="Folder for organisms, units and tables; runs resume there.")
    ] = OUT,
    shard: Annotated[str, typer.Option("--shard", help="This machine's share of the cells, such as 3/64.")] = "1/1",
    executor: Annotated[Literal["local", "ray"], typer.Option(help="Where cells run.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Number of cells that run at a time; each uses one core.")] = 1,
    finished: Annotated[
        bool, typer.Option("--finished", help="Run nothing: write the tables from the cells that are finished.")
    ] = False,
    docs: Annotated[
        Path | None,
        typer.Option("--docs", help="Another folder, for the tables of the documentation.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure every method on organisms with known truth, and write a leaderboard.

    Each cell plants an organism and its clean twin, and scores every method on them, those of plugins included. Finished
    cells are stored: a run that was killed goes on, and machines that share the folder can each take a --shard. A shard
    other than 1/1 writes no table.
    """
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.errors import UsageError, printable
    from molehunt.workflows.bench import bench as measured

    if docs is not None and docs.exists() and not docs.is_dir():
        raise UsageError(f"{printable(str(docs))} is a file; tables need a folder.")
    result = measured(
        grid, out=out, shard=shard, executor=executor, workers=workers, finished=finished, track=track_on_stderr
    )
    if result.content is None:
        say(f"{result.done} of {result.planned} cells are done. {LATER}")
        return
    if docs is not None:
        result.save_docs(docs)
    if as_json:
        show_json(result.content)
    else:
        show(result.markdown)
    say(f"{result.done} of {result.planned} cells; main file: {out / next(iter(result.files))}")
