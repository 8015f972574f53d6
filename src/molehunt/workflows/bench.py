"""`molehunt.bench`: every method on organisms with known truth."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from molehunt.bench.grid import Grid, load_grid
from molehunt.bench.leaderboard import leaderboard, to_csv
from molehunt.bench.published import finished_published, published_jobs, run_published
from molehunt.bench.run import Executor, finished_cell, jobs, run_cell
from molehunt.errors import NotTestable, UsageError, printable, terminal_text
from molehunt.report.bench_lead import board_lead, published_lead
from molehunt.report.bench_page import board_markdown, render_board
from molehunt.report.published_page import published_markdown
from molehunt.run.folder import RunFolder
from molehunt.run.literals import checked
from molehunt.run.local import LocalExecutor, WorkShard
from molehunt.run.progress import Track, silent
from molehunt.workflows.result import summary_html, summary_repr

PUBLISHED = "published"
"""Name of the grid that repeats the protocol of arXiv 2605.07324."""
MADE_BY = "Made by `molehunt bench --grid {name} --docs docs/results`; [how to read it](../guides/bench.md).\n\n"


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What a grid measured. Without `content`, one shard of several was run, and there are no tables yet."""

    grid: str
    planned: int
    """Cells in the grid."""
    done: int
    """Cells that this call ran or found finished."""
    out: Path
    content: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    """The leaderboard; for the published protocol a list with one entry for each model."""
    markdown: str = ""
    """The tables."""
    lead: tuple[str, ...] = ()
    """Three sentences for a reader who has to decide something."""
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """Text of every table and page, by file name; the first is the main one."""

    @property
    def complete(self) -> bool:
        """Whether there are tables."""
        return self.content is not None

    def summary(self) -> str:
        """What was run, and three sentences that say what it means."""
        head = f"{self.done} of {self.planned} cells of the grid {self.grid} are done."
        return terminal_text(" ".join((head, *self.lead)))

    def to_dict(self) -> dict[str, Any]:
        """The leaderboard as JSON; for the published protocol its list under `published`."""
        if self.content is None:
            return {"grid": self.grid, "planned": self.planned, "done": self.done}
        return dict(self.content) if isinstance(self.content, Mapping) else {"published": list(self.content)}

    def save(self, folder: Path | str) -> Path:
        """Write the tables and pages into `folder`, and return the main one.

        Raises:
            NotTestable: one shard of several was run, so there are no tables.
        """
        if not self.files:
            raise NotTestable("One shard was run, and the tables need all. When they are done, run without a shard.")
        run = RunFolder(Path(folder))
        run.path.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            run.write_text(name, text)
        return run.path / next(iter(self.files))

    def save_docs(self, folder: Path | str) -> Path:
        """Write the tables for the documentation into `folder`, and return the page."""
        run = RunFolder(Path(folder))
        run.path.mkdir(parents=True, exist_ok=True)
        if self.grid == PUBLISHED:
            title = "# The published protocol, and what its score measures\n\n"
        else:
            title = f"# Leaderboard of the grid {self.grid}\n\n"
            run.write_text(f"bench-{self.grid}.csv", self.files["leaderboard.csv"])
        return run.write_text(f"bench-{self.grid}.md", title + MADE_BY.format(name=self.grid) + self.markdown)

    def __repr__(self) -> str:
        return summary_repr(self)

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


@checked
def bench(
    grid: str | Path | Grid = "core",
    *,
    out: Path | str = "bench",
    shard: str = "1/1",
    executor: Literal["local", "ray"] = "local",
    workers: int = 1,
    finished: bool = False,
    track: Track = silent,
) -> BenchResult:
    """Measure every method on organisms with known truth.

    Each cell plants an organism and its clean twin, and scores every detector on them, plugins included. Finished cells
    are stored under `out`, so that an interrupted run goes on where it stopped.

    Args:
        grid: `core`, `smoke` or `published`, a YAML file of cells, or a Grid.
        out: folder for organisms, units and tables.
        shard: this machine's share of the cells, such as `3/64`. A share of several gives no tables.
        executor: where cells run.
        workers: number of cells that run at a time; each uses one core.
        finished: run nothing, and make the tables from the cells that are finished.
        track: shows progress.

    Raises:
        UsageError: no such grid, or a cell that cannot be run; nothing is trained then.
        NotTestable: `finished` was given, and no cell is.

    Example:
        >>> import molehunt as mh
        >>> result = mh.bench("smoke", out="bench")  # doctest: +SKIP
        >>> print(result.summary())  # doctest: +SKIP
    """
    share, folder = WorkShard.parse(shard), Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{printable(str(folder))} is a file; tables need a folder.")
    runner = _executor(executor, share, workers, track)
    inner = track if executor == "local" and workers == 1 else silent  # other processes cannot draw on one terminal
    if grid == PUBLISHED:
        return _published(runner, folder, tables=share == WorkShard(), finished=finished, track=inner)
    chosen = grid if isinstance(grid, Grid) else load_grid(str(grid))
    planned = jobs(chosen, folder.absolute())
    folder.mkdir(parents=True, exist_ok=True)
    if finished:
        cells = [found for job in planned if (found := finished_cell(job)) is not None]
        if not cells:
            raise NotTestable(f"No cell of the grid {chosen.name} is finished under {folder}.")
    else:
        cells = list(runner.map(partial(run_cell, track=inner), planned, f"grid {chosen.name}"))
    if share != WorkShard():
        return BenchResult(grid=chosen.name, planned=len(planned), done=len(cells), out=folder)
    result = _leaderboard(chosen.name, cells, len(planned), folder)
    result.save(folder)
    RunFolder(folder).write_env()
    return result


def _executor(executor: Literal["local", "ray"], share: WorkShard, workers: int, track: Track) -> Executor:
    if executor == "ray":
        from molehunt.run.ray import RayExecutor  # an optional dependency

        return RayExecutor(workers, share, track)
    return LocalExecutor(share, track, workers)


def _leaderboard(name: str, cells: Sequence[Mapping[str, Any]], planned: int, out: Path) -> BenchResult:
    board = leaderboard(name, cells, planned=planned)
    return BenchResult(
        grid=name,
        planned=planned,
        done=len(cells),
        out=out,
        content=board,
        markdown=board_markdown(board),
        lead=board_lead(board),
        files={
            "leaderboard.html": render_board(board),
            "leaderboard.csv": to_csv(board),
            "leaderboard.json": _as_json(board),
        },
    )


def _published(runner: Executor, out: Path, *, tables: bool, finished: bool, track: Track) -> BenchResult:
    planned = published_jobs(out.absolute())
    if finished:
        found = [one for job in planned if (one := finished_published(job)) is not None]
    else:
        found = list(runner.map(partial(run_published, track=track), planned, "published protocol"))
    if not tables:
        return BenchResult(grid=PUBLISHED, planned=len(planned), done=len(found), out=out)
    markdown = published_markdown(found)
    result = BenchResult(
        grid=PUBLISHED,
        planned=len(planned),
        done=len(found),
        out=out,
        content=found,
        markdown=markdown,
        lead=published_lead(found),
        files={"published.md": markdown, "published.json": _as_json(found)},
    )
    result.save(out)
    return result


def _as_json(value: Any) -> str:
    """Indented JSON with sorted keys, as the files of a run have it."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
