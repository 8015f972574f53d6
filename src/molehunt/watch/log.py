"""Watch a log: calibrate on clean traffic, judge every row, quarantine what is flagged, and go on after a kill."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.steer.ablate import Ablate
from molehunt.traffic.roles import RoledTokens, roled_prompt
from molehunt.traffic.split import Calibrate, Fit
from molehunt.traffic.stream import Conversation
from molehunt.watch.alert import Alert
from molehunt.watch.answers import answer_profiles, token_columns
from molehunt.watch.bank import Bank
from molehunt.watch.drift import DriftMartingale, reference_margin, smoothed_p_value
from molehunt.watch.ledger import Ledger
from molehunt.watch.monitor import Judged, Monitor
from molehunt.watch.profile import Profile
from molehunt.watch.state import WatchState

CHUNK = 256
"""Rows that are read, judged and written together; a killed run repeats at most one chunk."""
DRIFT_LEVEL = 0.01
"""Chance of ever calling unchanged traffic changed."""
SHOWN = 48
"""Tokens of an alert that are kept around its span."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Scored:
    """One conversation, the answer that was judged, and what the monitor says."""

    conversation: Conversation
    prompt: RoledTokens
    answer: tuple[int, ...]
    profile: Profile
    judged: Judged

    @property
    def coverage(self) -> float:
        """Share of the answer's tokens whose making was scored; an empty answer has its decision alone."""
        return self.profile.tokens / max(1, len(self.answer))


def read_answers(
    pair: ModelPair, bank: Bank, rows: Sequence[Conversation], *, max_new_tokens: int, track: Track = silent, what: str
) -> list[tuple[RoledTokens, tuple[int, ...], Profile]]:
    """Prompt, answer and profile of each row. A logged answer is read as it is; others are generated, greedily."""
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
        found = answer_profiles(
            model,
            bank,
            [prompt.ids for prompt in prompts],
            answers,
            layers_path=pair.layers_path,
            track=track,
            what=f"{what}: scoring",
        )
    return list(zip(prompts, answers, found, strict=True))


def calibrated(
    pair: ModelPair,
    bank: Bank,
    clean: Sequence[Conversation],
    *,
    fpr: float,
    identity: Mapping[str, str],
    max_new_tokens: int,
    seed: int,
    track: Track = silent,
) -> WatchState:
    """Fit a monitor on half of the clean rows and set its rate on the other half.

    Raises:
        NotTestable: too few clean rows for `fpr`: the monitor abstains rather than guess.
    """
    rows = list(clean)
    Random(seed).shuffle(rows)
    found = [p for _, _, p in read_answers(pair, bank, rows, max_new_tokens=max_new_tokens, track=track, what="clean")]
    half = len(found) // 2
    monitor = Monitor.fit(Fit(tuple(found[:half])), Calibrate(tuple(found[half:])))
    monitor.threshold(fpr)  # abstain now, not after hours
    unflagged = int((monitor.calibration <= monitor.threshold(fpr)).sum())
    return WatchState(
        identity=identity,
        monitor=monitor,
        drift=DriftMartingale(level=DRIFT_LEVEL / 2, margin=reference_margin(unflagged, DRIFT_LEVEL / 2)),
        rng=np.random.default_rng(seed),
    )


def watch_log(
    pair: ModelPair,
    bank: Bank,
    state: WatchState,
    rows: Iterable[Conversation],
    *,
    fpr: float,
    max_new_tokens: int,
    into: Path,
    ledger: Ledger,
    track: Track = silent,
) -> None:
    """Judge `rows`, append a line for each to `into/verdicts.jsonl`, record alerts, keep the state after every chunk.

    Flagged rows are quarantined in the ledger: neither the running scores nor the drift test see them.

    Raises:
        LedgerUnavailable: an alert could not be stored; the chunk counts as not judged.
    """
    verdicts = into / "verdicts.jsonl"
    with verdicts.open("ab") as file:
        file.truncate(state.written)  # a chunk that was written, and not finished, is written again
        for chunk in _chunks(rows):
            scored = _judge(pair, bank, state.monitor, chunk, max_new_tokens, track)
            for one in scored:
                flagged = one.judged.p_value <= fpr
                state.seen += 1
                state.flagged += flagged
                if flagged:
                    _quarantine(ledger, pair, bank, state, one, fpr, max_new_tokens)
                else:
                    _absorb(state, one.judged, fpr)
                file.write((json.dumps(verdict(bank, one, flagged)) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            state.written = file.tell()
            state.place = chunk[-1].end
            state.save(into / "state.safetensors")


def verdict(bank: Bank, one: Scored, flagged: bool) -> dict[str, Any]:
    """The line of `verdicts.jsonl` for one row; no text of it."""
    first = one.judged.columns[0]
    names = bank.names
    return {
        "line": one.conversation.line,
        "tag": one.conversation.tag,
        "flagged": flagged,
        "score": round(one.judged.score, 4),
        "p_value": one.judged.p_value,
        "direction": names[first % len(names)],
        "side": "high" if first < len(names) else "low",
        "look": one.judged.look,
        "token": int(one.profile.peaks[first]) + one.prompt.decision,
        "tokens": len(one.prompt.ids) + len(one.answer),
        "coverage": one.coverage,
        "within_calibration": one.judged.within_calibration,
    }


def _chunks(rows: Iterable[Conversation]) -> Iterator[Sequence[Conversation]]:
    remaining = iter(rows)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


def _judge(
    pair: ModelPair, bank: Bank, monitor: Monitor, rows: Sequence[Conversation], max_new_tokens: int, track: Track
) -> list[Scored]:
    read = read_answers(pair, bank, rows, max_new_tokens=max_new_tokens, track=track, what=f"from line {rows[0].line}")
    return [
        Scored(conversation=row, prompt=prompt, answer=answer, profile=profile, judged=monitor.judge(profile))
        for row, (prompt, answer, profile) in zip(rows, read, strict=True)
    ]


def _absorb(state: WatchState, judged: Judged, fpr: float) -> None:
    """A row that was not flagged widens what is known of clean traffic, and is one more bet on drift."""
    state.scores.add(torch.tensor([[judged.score]]))
    calm = state.monitor.calibration[state.monitor.calibration <= state.monitor.threshold(fpr)]
    above, tied = int((calm > judged.score).sum()), int((calm == judged.score).sum())
    state.drift.update(smoothed_p_value(above, tied, len(calm), state.rng))


def _quarantine(
    ledger: Ledger, pair: ModelPair, bank: Bank, state: WatchState, one: Scored, fpr: float, max_new_tokens: int
) -> None:
    """Record an alert, once: a chunk that is repeated after a kill meets its own alerts."""
    ids = (*one.prompt.ids, *one.answer)
    # the same row of the same log under the same state is the same alert
    name = json.dumps([dict(state.identity), one.conversation.line, ids])
    id = hashlib.sha256(name.encode()).hexdigest()[:32]
    if ledger.get(id) is not None:
        return
    told = verdict(bank, one, True)
    direction = bank.direction(one.judged.columns[0])
    with pair.tuned_model() as model:
        scores = state.monitor.by_token(
            one.judged.look, token_columns(model, bank, ids, layers_path=pair.layers_path)
        ).tolist()
        without = generate(
            model,
            pair.tokenizer,
            [one.prompt.ids],
            max_new_tokens=max_new_tokens,
            interventions=[Ablate(direction.site, direction.vector[None])],
            layers_path=pair.layers_path,
        )[0]
    at = told["token"]
    start = max(0, at - SHOWN // 2)
    shown = slice(start, start + SHOWN)
    ledger.record(
        Alert(
            id=id,
            request=f"line {one.conversation.line}",
            action="flag",
            score=one.judged.score,
            p_value=one.judged.p_value,
            fpr=fpr,
            region="decision" if one.judged.look == 0 else "answer",
            direction=direction.name,
            layer=direction.site.layer,
            span=(at, at + 1),
            coverage=one.coverage,
            profile=one.profile.looks[-1].numpy().astype("<f4").tobytes(),
            tokens=tuple(str(pair.tokenizer.decode([i])) for i in ids[shown]),
            token_scores=tuple(scores[shown]),
            tokens_from=start,
            answer=_text(pair, one.answer),
            answer_without=_text(pair, without),
        )
    )


def _text(pair: ModelPair, ids: Sequence[int]) -> str:
    return str(pair.tokenizer.decode(list(ids), skip_special_tokens=True))
