"""Watch a log: judge every row, quarantine what is flagged, and go on after a kill."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.traffic.stream import Conversation, Place
from molehunt.watch.alert_store import AlertStore
from molehunt.watch.bank import Bank
from molehunt.watch.drift import smoothed_p_value
from molehunt.watch.extremes import Inputs, whole_prompt
from molehunt.watch.judge import JudgedAnswer, judge_answers, row_texts
from molehunt.watch.monitor import Judgement
from molehunt.watch.quarantine import alert_of, explained, look_alikes
from molehunt.watch.row_verdict import RowVerdict
from molehunt.watch.state import WatchState

CHUNK = 256
"""Rows that are read, judged and written together; a killed run repeats at most one chunk."""
ALIKE_AMONG = 64
"""Number of the newest alerts that a new one is compared with."""

RowJudge = Callable[[Sequence[Conversation]], list[RowVerdict]]
"""Judges one chunk of rows and updates the state of its watch."""


def watch_log(
    pair: ModelPair,
    bank: Bank,
    state: WatchState,
    inputs: Inputs,
    rows: Iterable[Conversation],
    *,
    fpr: float,
    max_new_tokens: int,
    into: Path,
    ledger: AlertStore,
    track: Track = silent,
) -> None:
    """Judge `rows`, append a line for each to `into/verdicts.jsonl`, record alerts, save the state after every chunk.

    Raises:
        LedgerUnavailable: an alert could not be stored; the chunk counts as not judged.
    """
    judge = row_judge(pair, bank, state, inputs, fpr=fpr, max_new_tokens=max_new_tokens, alerts=ledger, track=track)
    record(rows, state, inputs, into / "verdicts.jsonl", into / "state.safetensors", judge)


def row_judge(
    pair: ModelPair,
    bank: Bank,
    state: WatchState,
    inputs: Inputs,
    *,
    fpr: float,
    max_new_tokens: int,
    alerts: AlertStore,
    track: Track = silent,
) -> RowJudge:
    """A judge of chunks at the rate that `state` was calibrated for.

    Flagged rows are quarantined in `alerts`: neither the running scores nor the drift test see them, and `inputs`
    keeps them apart.
    """

    def judge(chunk: Sequence[Conversation]) -> list[RowVerdict]:
        what = f"from line {chunk[0].line}"
        judged = judge_answers(pair, bank, state.monitor, chunk, max_new_tokens=max_new_tokens, track=track, what=what)
        verdicts = [one.verdict(bank, row, fpr=fpr) for row, one in zip(chunk, judged, strict=True)]
        for row, one, verdict in zip(chunk, judged, verdicts, strict=True):
            state.seen += 1
            state.flagged += verdict.flagged
            if verdict.flagged:
                _quarantine(alerts, pair, bank, state, row, one, fpr, max_new_tokens)
            else:
                absorb(state, one.judged)
        inputs.take(
            torch.stack([one.profile.prefixes[-1] for one in judged]),
            [row.line for row in chunk],
            row_texts(pair, chunk, [one.answer for one in judged]),
            torch.tensor([verdict.flagged for verdict in verdicts]),
            [whole_prompt(row.turns) for row in chunk],
        )
        return verdicts

    return judge


@runtime_checkable
class Resumable(Protocol):
    """A state from which a watch goes on."""

    place: Place
    written: int

    @property
    def identity(self) -> Mapping[str, str]: ...

    def save(self, path: Path) -> None: ...


def record(
    rows: Iterable[Conversation],
    state: Resumable,
    inputs: Inputs,
    verdicts: Path,
    state_file: Path,
    judge: RowJudge,
) -> None:
    """Judge `rows` in chunks; write a line for each, and what a restart needs after every chunk."""
    with verdicts.open("ab") as file:
        file.truncate(state.written)  # a chunk that was written, and not finished, is written again
        for chunk in chunks(rows):
            file.writelines(verdict_line(verdict) for verdict in judge(chunk))
            file.flush()
            os.fsync(file.fileno())
            inputs.save(verdicts.parent, state.identity)  # before the state: a repeated row counts once
            state.written = file.tell()
            state.place = chunk[-1].end
            state.save(state_file)


def verdict_line(verdict: RowVerdict) -> bytes:
    """The line of `verdicts.jsonl` for one row."""
    return (json.dumps(verdict.to_dict()) + "\n").encode()


def chunks(rows: Iterable[Conversation]) -> Iterator[Sequence[Conversation]]:
    """The rows in order, `CHUNK` at a time."""
    remaining = iter(rows)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


def absorb(state: WatchState, judged: Judgement) -> None:
    """Add an unflagged row to what is known of clean traffic, and make one more bet on drift."""
    state.scores.add(torch.tensor([[judged.score]]))
    unflagged = state.monitor.calibration[state.monitor.calibration <= state.monitor.threshold]
    above, tied = int((unflagged > judged.score).sum()), int((unflagged == judged.score).sum())
    state.drift.update(smoothed_p_value(above, tied, len(unflagged), state.rng))


def _quarantine(
    alerts: AlertStore,
    pair: ModelPair,
    bank: Bank,
    state: WatchState,
    row: Conversation,
    one: JudgedAnswer,
    fpr: float,
    max_new_tokens: int,
) -> None:
    """Record an alert, once: a chunk that is repeated after a kill meets its own alerts."""
    # the same row of the same log under the same state is the same alert
    name = json.dumps([dict(state.identity), row.line, one.prompt, one.answer])
    id = hashlib.sha256(name.encode()).hexdigest()[:32]
    if alerts.get(id) is not None:
        return
    alert = alert_of(
        bank,
        pair.tokenizer,
        one,
        request=f"line {row.line}",
        action="flag",
        fpr=fpr,
        extremes=state.extremes,
        look_alikes=look_alikes(state.monitor, one, alerts.recent(ALIKE_AMONG)),
    )
    with pair.tuned_model() as model:
        whole = explained(
            replace(alert, id=id),
            model,
            pair.tokenizer,
            bank,
            state.monitor,
            one,
            max_new_tokens=max_new_tokens,
            layers_path=pair.layers_path,
        )
    alerts.record(whole)
