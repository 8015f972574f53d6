"""Watch a log: calibrate on clean traffic, judge every row, quarantine what is flagged, and go on after a kill."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.traffic.roles import RoledTokens, roled_prompt
from molehunt.traffic.split import Calibrate, Fit
from molehunt.traffic.stream import Conversation, Place
from molehunt.watch.alert import Extreme
from molehunt.watch.answers import answer_profiles
from molehunt.watch.bank import Bank
from molehunt.watch.drift import DriftMartingale, reference_margin, smoothed_p_value
from molehunt.watch.extremes import Inputs, Text
from molehunt.watch.ledger import Ledger
from molehunt.watch.monitor import Judged, Monitor
from molehunt.watch.profile import Profile
from molehunt.watch.quarantine import Answered, alert_of, explained, look_alikes
from molehunt.watch.state import WatchState
from molehunt.watch.suspects import Suspect, Suspects, answer_log_ratios, suspicious

CHUNK = 256
"""Rows that are read, judged and written together; a killed run repeats at most one chunk."""
DRIFT_LEVEL = 0.01
"""Chance of ever calling unchanged traffic changed."""
ALIKE_AMONG = 64
"""Newest alerts that a new one is compared with."""
EXTREMES = 16
"""Highest calibration rows that are remembered, so that an alert can be held against them; and suspicious ones."""
LONGEST_TEXT = 400
"""Characters of such a row."""


def read_answers(
    pair: ModelPair, bank: Bank, rows: Sequence[Conversation], *, max_new_tokens: int, track: Track = silent, what: str
) -> list[tuple[RoledTokens, tuple[int, ...], Profile]]:
    """Prompt, answer and profile of each row, answered as `answered` does."""
    both = answered(pair, rows, max_new_tokens=max_new_tokens, track=track, what=what)
    with pair.tuned_model() as model:
        found = answer_profiles(
            model,
            bank,
            [prompt.ids for prompt, _ in both],
            [answer for _, answer in both],
            layers_path=pair.layers_path,
            track=track,
            what=f"{what}: scoring",
        )
    return [(prompt, answer, profile) for (prompt, answer), profile in zip(both, found, strict=True)]


def answered(
    pair: ModelPair, rows: Sequence[Conversation], *, max_new_tokens: int, track: Track = silent, what: str
) -> list[tuple[RoledTokens, tuple[int, ...]]]:
    """Prompt and answer of each row. A logged answer is read as it is; others are generated, greedily."""
    prompts = [roled_prompt(pair.tokenizer, row.turns) for row in rows]
    answers: list[tuple[int, ...]] = [
        tuple(pair.tokenizer.encode(row.response, add_special_tokens=False)) if row.response else () for row in rows
    ]
    open_rows = [i for i, row in enumerate(rows) if not row.response]
    with pair.tuned_model() as model:
        made = generate(
            model,
            pair.tokenizer,
            [prompts[i].ids for i in open_rows],
            max_new_tokens=max_new_tokens,
            layers_path=pair.layers_path,
            track=track,
            what=f"{what}: answering",
        )
    for i, answer in zip(open_rows, made, strict=True):
        answers[i] = tuple(answer)
    return list(zip(prompts, answers, strict=True))


def calibrated(
    pair: ModelPair,
    bank: Bank,
    clean: Sequence[Conversation],
    *,
    fpr: float,
    identity: Mapping[str, str],
    max_new_tokens: int,
    seed: int,
    trust: bool = False,
    no_text: bool = False,
    track: Track = silent,
) -> WatchState:
    """Fit a monitor on half of the clean rows and set its rate on the other half.

    Rows whose answers the base would not give are set aside first (see `watch.suspects`); with `trust` they are kept.
    With `no_text` the state remembers nothing of what the rows say.

    Raises:
        NotTestable: too few clean rows for `fpr`: the monitor abstains rather than guess.
    """
    rows = list(clean)
    Random(seed).shuffle(rows)
    read = read_answers(pair, bank, rows, max_new_tokens=max_new_tokens, track=track, what="clean")
    found = [profile for _, _, profile in read]
    ratios = answer_log_ratios(pair, [prompt.ids for prompt, _, _ in read], [a for _, a, _ in read], track=track)
    half = len(found) // 2

    def fitted(left_out: Collection[int]) -> tuple[Monitor, list[int]]:
        """And the rows that set its rate."""
        fit, held = ([i for i in part if i not in left_out] for part in (range(half), range(half, len(found))))
        some = Fit(tuple(found[i] for i in fit)), Calibrate(tuple(found[i] for i in held))
        return Monitor.fit(*some, fpr=fpr), held

    with_all = fitted(())
    kinds = with_all[0].kinds.of(torch.stack([one.prompt for one in found]))
    limits, suspects = suspicious(ratios, kinds)
    without = fitted(set(suspects)) if suspects else with_all

    def flagged(one: Monitor) -> int:
        return int((one.scores([found[i] for i in suspects]) > one.threshold).sum())

    monitor, held = with_all if trust else without
    scores = monitor.scores([found[i] for i in held])
    unflagged = int((scores <= monitor.threshold).sum())

    def text(i: int) -> str:
        return "" if no_text else rows[i].turns[-1].text[:LONGEST_TEXT]

    return WatchState(
        identity=identity,
        monitor=monitor,
        extremes=tuple(
            Extreme(score=float(scores[i]), text=text(held[i]))
            for i in scores.argsort(descending=True)[:EXTREMES].tolist()
        ),
        suspects=Suspects(
            n=len(suspects),
            clean=len(found),
            limits=limits,
            trusted=trust,
            flagged_without=flagged(without[0]),
            flagged_with=flagged(with_all[0]),
            rows=tuple(Suspect(line=rows[i].line, nats=ratios[i], text=text(i)) for i in suspects[:EXTREMES]),
        ),
        drift=DriftMartingale(level=DRIFT_LEVEL / 2, margin=reference_margin(unflagged, DRIFT_LEVEL / 2)),
        rng=np.random.default_rng(seed),
    )


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
    ledger: Ledger,
    track: Track = silent,
) -> None:
    """Judge `rows`, append a line for each to `into/verdicts.jsonl`, record alerts, keep the state after every chunk.

    Flagged rows are quarantined in the ledger: neither the running scores nor the drift test see them, and `inputs`
    keeps them apart.

    Raises:
        LedgerUnavailable: an alert could not be stored; the chunk counts as not judged.
    """

    def judged(chunk: Sequence[Conversation]) -> list[dict[str, Any]]:
        scored = _judge(pair, bank, state.monitor, chunk, max_new_tokens, track)
        flags = [one.judged.p_value <= fpr for one in scored]
        for row, one, flagged in zip(chunk, scored, flags, strict=True):
            state.seen += 1
            state.flagged += flagged
            if flagged:
                _quarantine(ledger, pair, bank, state, row, one, fpr, max_new_tokens)
            else:
                absorb(state, one.judged)
        inputs.take(
            torch.stack([one.profile.looks[-1] for one in scored]),
            [row.line for row in chunk],
            texts(pair, chunk, [one.answer for one in scored]),
            torch.tensor(flags),
        )
        return [verdict(bank, row, one, flagged) for row, one, flagged in zip(chunk, scored, flags, strict=True)]

    record(rows, state, inputs, into / "verdicts.jsonl", into / "state.safetensors", judged)


@runtime_checkable
class Resumable(Protocol):
    """What a watch goes on from."""

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
    judged: Callable[[Sequence[Conversation]], Iterable[Mapping[str, Any]]],
) -> None:
    """Judge `rows` in chunks; write a line for each, and what a restart needs after every chunk."""
    with verdicts.open("ab") as file:
        file.truncate(state.written)  # a chunk that was written, and not finished, is written again
        for chunk in _chunks(rows):
            file.writelines((json.dumps(told) + "\n").encode() for told in judged(chunk))
            file.flush()
            os.fsync(file.fileno())
            inputs.save(verdicts.parent, state.identity)  # before the state: a repeated row counts once
            state.written = file.tell()
            state.place = chunk[-1].end
            state.save(state_file)


def texts(pair: ModelPair, rows: Sequence[Conversation], answers: Sequence[Sequence[int]]) -> list[Text]:
    """What the rows say, cut: a logged answer as it was logged."""
    return [
        Text.of(row.turns, row.response or str(pair.tokenizer.decode(list(answer), skip_special_tokens=True)))
        for row, answer in zip(rows, answers, strict=True)
    ]


def verdict(bank: Bank, row: Conversation, one: Answered, flagged: bool) -> dict[str, Any]:
    """The line of `verdicts.jsonl` for one row; no text of it."""
    first = one.judged.columns[0]
    names = bank.names
    return {
        "line": row.line,
        "tag": row.tag,
        "flagged": flagged,
        "score": round(one.judged.score, 4),
        "p_value": one.judged.p_value,
        "direction": names[first % len(names)],
        "side": "high" if first < len(names) else "low",
        "look": one.judged.look,
        "token": one.token,
        "tokens": len(one.prompt) + len(one.answer),
        "coverage": one.coverage,
        "within_calibration": one.judged.within_calibration,
    }


def _chunks(rows: Iterable[Conversation]) -> Iterator[Sequence[Conversation]]:
    remaining = iter(rows)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


def _judge(
    pair: ModelPair, bank: Bank, monitor: Monitor, rows: Sequence[Conversation], max_new_tokens: int, track: Track
) -> list[Answered]:
    read = read_answers(pair, bank, rows, max_new_tokens=max_new_tokens, track=track, what=f"from line {rows[0].line}")
    return [
        Answered(
            prompt=prompt.ids,
            answer=answer,
            profile=profile,
            judged=monitor.judge(profile),
            # an empty answer has its decision alone
            coverage=profile.tokens / max(1, len(answer)),
        )
        for prompt, answer, profile in read
    ]


def absorb(state: WatchState, judged: Judged) -> None:
    """A row that was not flagged widens what is known of clean traffic, and is one more bet on drift."""
    state.scores.add(torch.tensor([[judged.score]]))
    calm = state.monitor.calibration[state.monitor.calibration <= state.monitor.threshold]
    above, tied = int((calm > judged.score).sum()), int((calm == judged.score).sum())
    state.drift.update(smoothed_p_value(above, tied, len(calm), state.rng))


def _quarantine(
    ledger: Ledger,
    pair: ModelPair,
    bank: Bank,
    state: WatchState,
    row: Conversation,
    one: Answered,
    fpr: float,
    max_new_tokens: int,
) -> None:
    """Record an alert, once: a chunk that is repeated after a kill meets its own alerts."""
    # the same row of the same log under the same state is the same alert
    name = json.dumps([dict(state.identity), row.line, one.prompt, one.answer])
    id = hashlib.sha256(name.encode()).hexdigest()[:32]
    if ledger.get(id) is not None:
        return
    alert = alert_of(
        bank,
        pair.tokenizer,
        one,
        request=f"line {row.line}",
        action="flag",
        fpr=fpr,
        extremes=state.extremes,
        look_alikes=look_alikes(state.monitor, one, ledger.recent(ALIKE_AMONG)),
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
    ledger.record(whole)
