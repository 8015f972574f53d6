"""`molehunt bench`: every method on organisms with known truth."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from molehunt.cli.options import AsJson

if TYPE_CHECKING:
    from molehunt.bench.run import Executor

OUT = Path("bench")
LATER = "When all shards are, run without --shard for the tables."


def bench(
    grid: Annotated[
        str, typer.Option("--grid", help="published, core, smoke, or a YAML file of cells.", show_default=True)
    ] = "core",
    out: Annotated[
        Path, typer.Option("--out", help="Folder for organisms, units and tables; runs resume there.")
    ] = OUT,
    shard: Annotated[str, typer.Option("--shard", help="This machine's share of the cells, such as 3/64.")] = "1/1",
    executor: Annotated[Literal["local", "ray"], typer.Option(help="Where cells run.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Cells at a time; each uses one core.")] = 1,
    finished: Annotated[
        bool, typer.Option("--finished", help="Run nothing: write the tables from the cells that are finished.")
    ] = False,
    docs: Annotated[
        Path | None,
        typer.Option(
            "--docs", help="Folder to write the tables for the documentation to, as well.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure every method on organisms with known truth, and write a leaderboard.

    Each cell plants an organism and its clean twin, and scores every method on them. Finished cells are kept: a run that
    was killed goes on, and machines that share the folder can each take a --shard. A shard other than 1/1 writes no table.
    """
    import json
    from functools import partial

    from molehunt.bench.grid import load_grid
    from molehunt.bench.leaderboard import leaderboard, to_csv
    from molehunt.bench.run import finished_cell, jobs, run_cell
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.errors import NotTestable, UsageError
    from molehunt.report.bench_page import board_markdown, render_board
    from molehunt.run.folder import RunFolder
    from molehunt.run.local import LocalExecutor, Shard

    share = Shard.parse(shard)
    for folder in (out, docs):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; tables need a folder.")
    runner: Executor
    if executor == "ray":
        from molehunt.run.ray import RayExecutor

        runner = RayExecutor(workers, share, track_on_stderr)
    else:
        runner = LocalExecutor(share, track_on_stderr, workers)
    alone = executor == "local" and workers == 1  # cells in other processes cannot draw on this terminal
    if grid == "published":
        _published(runner, out, docs, alone=alone, table=share == Shard(), finished=finished, as_json=as_json)
        return
    chosen = load_grid(grid)
    planned = jobs(chosen, out.absolute())
    out.mkdir(parents=True, exist_ok=True)
    if finished:
        cells = [told for job in planned if (told := finished_cell(job)) is not None]
        if not cells:
            raise NotTestable(f"No cell of the grid {chosen.name} is finished under {out}.")
    else:
        cells = runner.map(
            partial(run_cell, track=track_on_stderr) if alone else run_cell, planned, f"grid {chosen.name}"
        )
    if share != Shard():
        say(f"{len(cells)} of {len(planned)} cells are done. {LATER}")
        return
    board = leaderboard(chosen.name, cells, planned=len(planned))
    run = RunFolder(out)
    run.write_json("leaderboard.json", board)
    run.write_text("leaderboard.csv", to_csv(board))
    page = run.write_text("leaderboard.html", render_board(board))
    markdown = board_markdown(board)
    if docs is not None:
        docs.mkdir(parents=True, exist_ok=True)
        head = f"# Leaderboard of the grid {chosen.name}\n\nMade by `molehunt bench --grid {chosen.name} --docs docs`; [how to read it](bench.md).\n\n"
        RunFolder(docs).write_text(f"bench-{chosen.name}.md", head + markdown)
        RunFolder(docs).write_text(f"bench-{chosen.name}.csv", to_csv(board))
    run.write_env()
    typer.echo(json.dumps(board, indent=2) if as_json else markdown)
    say(f"page: {page}")


def _published(
    runner: "Executor", out: Path, docs: Path | None, *, alone: bool, table: bool, finished: bool, as_json: bool
) -> None:
    import json
    from functools import partial

    from molehunt.bench.published import finished_published, published_jobs, run_published
    from molehunt.cli.console import say, track_on_stderr
    from molehunt.report.published_page import published_markdown
    from molehunt.run.folder import RunFolder

    planned = published_jobs(out.absolute())
    found: list[dict[str, Any]]
    if finished:
        found = [told for job in planned if (told := finished_published(job)) is not None]
        say(f"{len(found)} of {len(planned)} experiments are finished.")
    else:
        run_one = partial(run_published, track=track_on_stderr) if alone else run_published
        found = list(runner.map(run_one, planned, "published protocol"))
    if not table:
        say(f"{len(found)} of {len(planned)} experiments are done. {LATER}")
        return
    run = RunFolder(out)
    out.mkdir(parents=True, exist_ok=True)
    run.write_json("published.json", found)
    markdown = published_markdown(found)
    run.write_text("published.md", markdown)
    if docs is not None:
        docs.mkdir(parents=True, exist_ok=True)
        head = "# The published protocol, and what its score measures\n\nMade by `molehunt bench --grid published --docs docs`; [how to read it](bench.md).\n\n"
        RunFolder(docs).write_text("bench-published.md", head + markdown)
    typer.echo(json.dumps(found, indent=2) if as_json else markdown)
