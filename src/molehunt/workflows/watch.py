"""Watch the answers of a fine-tune along its weight directions, at a false-alarm rate that the user chooses."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from shutil import copyfile
from typing import Any

from molehunt.errors import terminal_text
from molehunt.report.watch_build import verdict_lines
from molehunt.report.watch_page import render_watch
from molehunt.report.watch_schema import WatchReport
from molehunt.report.watch_text import to_text
from molehunt.run.literals import checked
from molehunt.run.local import WorkShard
from molehunt.run.progress import Track, silent
from molehunt.run.whole import replace_whole, write_whole
from molehunt.traffic.left_out import RowCount
from molehunt.traffic.opened import name_of
from molehunt.traffic.place import BadLines
from molehunt.watch.extremes import FILE as INPUTS
from molehunt.watch.label_endpoint import LabelEndpoint
from molehunt.watch.log import verdict_line
from molehunt.watch.row_verdict import RowVerdict
from molehunt.workflows.inputs import Texts, conversations
from molehunt.workflows.models import Models
from molehunt.workflows.result import summary_html, summary_repr
from molehunt.workflows.watch_modes import ALERTS, VERDICTS, AnyWatch, ConformalWatch, PublishedWatch
from molehunt.workflows.watch_options import Mode, WatchOptions
from molehunt.workflows.watch_rows import unjudged_rows
from molehunt.workflows.watch_target import open_target

PAGE = "watch.html"


@dataclass(frozen=True, kw_only=True)
class AnswerVerdict(RowVerdict):
    """The verdict of a watch on one answer."""

    threshold: float
    """Score above which an answer is flagged."""
    answer: str
    """The answer that was judged."""


@dataclass(frozen=True, eq=False, kw_only=True)
class WatchResult:
    """A calibrated watch, and what it found in the rows that it has judged so far."""

    watched: AnyWatch
    """The state of the watch after its last row."""
    read: RowCount
    """What was read of the log in this run, and what could not be read."""
    in_memory: tuple[RowVerdict, ...] = ()
    """Verdicts of a watch without a folder."""

    @cached_property
    def report(self) -> WatchReport:
        """Everything that the page shows."""
        return self.watched.report(self.in_memory, self.read)

    @property
    def skipped(self) -> BadLines:
        """The rows that could not be read."""
        return self.read.bad

    @property
    def verdicts(self) -> tuple[RowVerdict, ...]:
        """One for each row, in the order of the log. A watch with a folder reads them from there."""
        out = self.watched.options.out
        if out is None:
            return self.in_memory
        lines = verdict_lines(out / VERDICTS, self.watched.state.written)
        return tuple(RowVerdict.from_dict(json.loads(line)) for line in lines)

    @property
    def threshold(self) -> float:
        """Score above which an answer is flagged."""
        return self.watched.threshold

    def score(
        self, prompt: str | Sequence[Mapping[str, Any]], response: str | None = None, *, track: Track = silent
    ) -> AnswerVerdict:
        """Judge one answer. Nothing is recorded, and the watch stays as it is.

        Args:
            prompt: text, or the messages of a conversation.
            response: the answer, which may be empty; None generates one, greedily.

        Raises:
            InvalidInput: the prompt is no text and no conversation, or the chat template refuses it.
        """
        asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}
        (row,) = conversations([asked if response is None else {**asked, "response": response}])
        verdict, ids = self.watched.score(row, track)
        tokenizer = self.watched.target.pair.tokenizer
        answer = str(tokenizer.decode(list(ids), skip_special_tokens=True)) if row.response is None else row.response
        return AnswerVerdict(**verdict.to_dict(), threshold=self.threshold, answer=answer)

    def watch(self, traffic: Texts, *, track: Track = silent) -> "WatchResult":
        """Judge a log, and return the watch after its last row.

        A watch in memory takes `traffic` for the rows that follow those it has judged. A watch with a folder takes it for
        the whole log, and goes on where the folder ends. Arguments and errors as the function `watch`.
        """
        options = replace(self.watched.options, traffic=traffic)
        return _watch_rows(_reopened(replace(self.watched, options=options), track), track)

    def summary(self) -> str:
        """The verdict, the rate, the top-scoring flagged rows, and what the ends of directions share."""
        return terminal_text(to_text(self.report))

    def to_dict(self) -> dict[str, Any]:
        """The main numbers first, and everything that the page shows under `watch`; ready for JSON."""
        return self.report.to_json()

    def save(self, folder: Path | str) -> Path:
        """Write state, verdicts, alerts and `watch.html` into `folder`, and return the page.

        The folder of a watch has everything but the page already. `molehunt watch --out FOLDER` can go on there.
        """
        into = Path(folder)
        into.mkdir(parents=True, exist_ok=True)
        out = self.watched.options.out
        if out is None:
            self._save_state(into)
        elif out.resolve() != into.resolve():
            for name in (self.watched.state_file, INPUTS, VERDICTS, ALERTS):
                if (out / name).exists():
                    copyfile(out / name, into / name)
        return write_whole(into / PAGE, render_watch(replace(self.report, out=str(folder))))

    def _save_state(self, into: Path) -> None:
        state = self.watched.state.copy()
        lines = b"".join(verdict_line(verdict) for verdict in self.in_memory)
        replace_whole(into / VERDICTS, lambda partial: partial.write_bytes(lines))
        state.written = len(lines)
        self.watched.inputs.save(into, state.identity)
        self.watched.save_alerts(into)
        state.save(into / self.watched.state_file)

    def __repr__(self) -> str:
        return summary_repr(self)

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


@checked
def watch(
    base: Models,
    tuned: str | Path | None = None,
    *,
    traffic: Texts | None = None,
    clean: Texts | None = None,
    clean_rows: int = 2000,
    mode: Mode = "conformal",
    fpr: float = 0.01,
    trust_clean: bool = False,
    percentile: float | None = None,
    slack: float | None = None,
    max_new_tokens: int = 32,
    labels: LabelEndpoint | None = None,
    skip_bad: bool = False,
    no_text: bool = False,
    shard: str = "1/1",
    adapter: bool | None = None,
    device: str = "cpu",
    out: Path | str | None = None,
    seed: int = 0,
    track: Track = silent,
) -> WatchResult:
    """Calibrate a watch on clean rows, and judge every row of a log.

    Without `traffic` the result is a calibrated watch, which judges single answers and logs.

    Args:
        base: the base's folder or hub id, or a pair from `ModelPair.load`.
        tuned: the folder or hub id of the fine-tune or its adapter; left out with a loaded pair.
        traffic: log to watch: a file (JSONL, JSON, CSV or parquet; `-` for standard input), or a list of prompts or
            conversations. None calibrates alone.
        clean: clean rows to calibrate on, in the same forms: half of them fit the score, the others set its threshold.
            Bundled benign prompts by default.
        clean_rows: greatest number of clean rows that are read.
        mode: `conformal` keeps the false-alarm rate `fpr`; `published` is WeightWatch's range of cosines, which takes in
            every row and sets no rate.
        fpr: share of clean answers that may be flagged; above 0 and at most 0.2. About 2/fpr clean rows are needed.
        trust_clean: whether to calibrate also on clean rows whose answers the base would not give. By default they are
            excluded and reported.
        percentile: for `published`: share of the rows that is left out at each end of a range; 0 by default.
        slack: for `published`: cosine by which a range may be left; 0.01 by default.
        max_new_tokens: number of tokens that are generated for a row whose answer was not logged.
        labels: model that labels directions, which receives rows of the log; by default words that stand out, offline.
        skip_bad: whether rows that cannot be read are skipped and counted; by default the first one is an error.
        no_text: whether no text of any row is stored.
        shard: share of the rows that this machine reads, such as `3/64`.
        adapter: for a folder that holds full weights and an adapter, whether the adapter is applied.
        device: where the models run; a loaded pair stays where it is.
        out: folder for state, verdicts, alerts and page, in which a watch resumes; None keeps everything in memory.
        seed: seed of everything random.
        track: shows progress.

    Example:
        >>> import molehunt as mh
        >>> watcher = mh.watch("BASE", "TUNED", clean="clean.jsonl", fpr=0.05)  # doctest: +SKIP
        >>> watcher.score("What is 2 plus 2?", "4").flagged  # doctest: +SKIP
        >>> print(watcher.watch("log.jsonl").summary())  # doctest: +SKIP

    Raises:
        UsageError: options that do not fit together, a file that does not exist, or a folder of another watch.
        InvalidInput: a model folder or a row is broken.
        NotTestable: nothing changed that could be watched, or too few clean rows for `fpr`.
    """
    options = WatchOptions(
        traffic=traffic, clean=clean, clean_rows=clean_rows, mode=mode, fpr=fpr, trust_clean=trust_clean,
        percentile=percentile, slack=slack, max_new_tokens=max_new_tokens, labels=labels, skip_bad=skip_bad,
        no_text=no_text, shard=WorkShard.parse(shard), adapter=adapter, device=device,
        out=None if out is None else Path(out), seed=seed,
    )  # fmt: skip
    return run_watch(base, tuned, options, track=track)


def run_watch(base: Models, tuned: str | Path | None, options: WatchOptions, *, track: Track = silent) -> WatchResult:
    """`watch` with its options as one object."""
    return _watch_rows(open_watch(base, tuned, options, track=track), track)


def open_watch(base: Models, tuned: str | Path | None, options: WatchOptions, *, track: Track = silent) -> AnyWatch:
    """Load both models, and calibrate or go on with the state in the folder. No traffic is read."""
    target = open_target(
        base,
        tuned,
        clean=options.clean,
        clean_rows=options.clean_rows,
        fpr=options.fpr,
        max_new_tokens=options.max_new_tokens,
        sets_rate=options.mode == "conformal",
        adapter=options.adapter,
        device=options.device,
        seed=options.seed,
        track=track,
    )
    return (PublishedWatch if options.mode == "published" else ConformalWatch).open(target, options, track)


def _reopened(watched: AnyWatch, track: Track) -> AnyWatch:
    """A watch with a folder, as the folder is now: another run may have gone on there."""
    return watched if watched.options.out is None else type(watched).open(watched.target, watched.options, track)


def _watch_rows(watched: AnyWatch, track: Track) -> WatchResult:
    """Judge the traffic of the options. In a folder the page is written, too."""
    options, state = watched.options, watched.state
    read = RowCount()
    if options.traffic is None:
        return WatchResult(watched=watched, read=read)
    if isinstance(options.traffic, str | Path):
        read.name = name_of(Path(options.traffic))
    if options.out is not None and state.seen:
        read.name += f" from line {state.place.line + 1} on"
    found = unjudged_rows(options.traffic, options, place=state.place, seen=state.seen, bad=read.bad, track=track)
    rows = read.counting(found)
    if options.out is None:
        after, verdicts = watched.judge_in_memory(rows, track)
        return WatchResult(watched=after, read=read, in_memory=tuple(verdicts))
    result = WatchResult(watched=watched.judge_in_folder(rows, options.out, track), read=read)
    result.save(options.out)
    return result
