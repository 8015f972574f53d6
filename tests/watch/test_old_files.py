"""Files that version 0.1 wrote are still read: a watch goes on from them without a new calibration."""

import json
import shutil
from pathlib import Path

import pytest

from molehunt.model.pair import ModelPair
from molehunt.watch.bank import Bank
from molehunt.watch.extremes import Inputs
from molehunt.watch.judge import judge_answers
from molehunt.watch.ledger import Ledger
from molehunt.watch.log import watch_log
from molehunt.watch.published import FILE, PublishedState, read_roles, role_names, watch_published
from molehunt.watch.row_verdict import RowVerdict
from molehunt.watch.state import WatchState
from watched_banks import bank_of
from watched_logs import IDENTITY, rows

GOLDEN = Path(__file__).parents[1] / "golden"
FPR = 0.05
LOG = [*rows(30, 1), *rows(10, 2, start=31, odd=True)]
"""The rows that the old watches had judged."""


@pytest.fixture(scope="module")
def bank() -> Bank:
    return bank_of("llama", k=1)


def test_an_old_state_judges_as_it_did(pair: ModelPair, bank: Bank) -> None:
    state = WatchState.load(GOLDEN / "watch-v4" / "state.safetensors", IDENTITY)
    assert (state.seen, state.flagged, state.drift.n, state.scores.n) == (40, 5, 35, 35)
    assert state.suspects is not None and state.suspects.clean == 400 and len(state.extremes) == 16
    lines = [json.loads(line) for line in (GOLDEN / "watch-v4" / "verdicts.jsonl").read_text().splitlines()]
    old = [RowVerdict.from_dict(line) for line in lines]
    assert [verdict.prefix_checkpoint for verdict in old] == [line["look"] for line in lines]
    judged = judge_answers(pair, bank, state.monitor, LOG, max_new_tokens=4)
    for row, one, verdict in zip(LOG, judged, old, strict=True):
        new = one.verdict(bank, row, fpr=FPR)
        assert new.score == pytest.approx(verdict.score, abs=1e-3) and new.flagged == verdict.flagged
        assert (new.direction, new.prefix_checkpoint) == (verdict.direction, verdict.prefix_checkpoint)


def test_an_old_watch_goes_on_and_is_then_of_the_new_version(pair: ModelPair, bank: Bank, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "watch-v4", tmp_path / "watch")
    state = WatchState.load(folder / "state.safetensors", IDENTITY)
    inputs = Inputs.load(folder, IDENTITY, len(bank.names))
    assert len(inputs.unflagged.end(0, high=True)) == 10 and len(inputs.quarantined.end(0, high=True)) == 5
    assert all(row.prompt == LOG[row.row - 1].turns[0].text for row in inputs.unflagged.end(0, high=True))
    threshold, more = state.monitor.threshold, rows(20, 3, start=41)
    with Ledger(f"sqlite:///{folder / 'alerts.sqlite'}") as ledger:
        watch_log(pair, bank, state, inputs, more, fpr=FPR, max_new_tokens=4, into=folder, ledger=ledger)
    lines = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == list(range(1, 61))
    assert all("look" in line for line in lines[:40]) and all("prefix_checkpoint" in line for line in lines[40:])
    again = WatchState.load(folder / "state.safetensors", IDENTITY)
    assert (again.seen, again.monitor.threshold) == (60, threshold)
    assert Inputs.load(folder, IDENTITY, len(bank.names)).unflagged.texts.keys() == inputs.unflagged.texts.keys()


def test_an_old_published_range_goes_on(pair: ModelPair, bank: Bank, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "watch-published-v1", tmp_path / "watch")
    state = PublishedState.load(folder / FILE, IDENTITY)
    assert (state.seen, state.flagged, state.calibration_rows) == (40, 6, 100)
    for one in read_roles(pair, bank, LOG, max_new_tokens=4, what="again"):  # the range has taken them in
        assert state.beyond(one).max() < 0
    inputs = Inputs.load(folder, IDENTITY, len(role_names(bank)))
    assert len(inputs.quarantined.end(0, high=True)) == 6
    state.written = 0
    watch_published(pair, bank, state, inputs, rows(5, 3, start=41), max_new_tokens=4, into=folder)
    assert PublishedState.load(folder / FILE, IDENTITY).seen == 45
