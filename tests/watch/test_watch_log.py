"""A log watched from calibration to alerts, with tiny random models."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from molehunt.errors import InvalidInput, NotTestable, UsageError
from molehunt.model.pair import ModelPair
from molehunt.traffic.stream import Conversation, Place
from molehunt.traffic.turn import Turn
from molehunt.watch import log as module
from molehunt.watch.bank import Bank
from molehunt.watch.calibration import calibrate
from molehunt.watch.drift import DriftMartingale
from molehunt.watch.extremes import FILE, KEPT, Inputs
from molehunt.watch.judge import read_answers
from molehunt.watch.ledger import Ledger
from molehunt.watch.log import watch_log
from molehunt.watch.monitor import PrefixScore, StratumCalibration
from molehunt.watch.scores import RangeExceedance
from molehunt.watch.state import WatchState
from watched_logs import IDENTITY, rows
from watched_track import WatchedTrack

FPR = 0.05


@pytest.fixture
def state(pair: ModelPair, bank: Bank) -> WatchState:
    return calibrate(pair, bank, rows(400, 0), fpr=FPR, identity=IDENTITY, max_new_tokens=4, seed=0)


def watch(
    pair: ModelPair, bank: Bank, state: WatchState, log: list[Conversation], into: Path, *, no_text: bool = False
) -> list[dict]:
    columns = len(bank.names)
    inputs = Inputs.load(into, IDENTITY, columns, no_text=no_text)
    with Ledger(f"sqlite:///{into / 'alerts.sqlite'}", no_text=no_text) as ledger:
        watch_log(pair, bank, state, inputs, log, fpr=FPR, max_new_tokens=4, into=into, ledger=ledger)
    return [json.loads(line) for line in (into / "verdicts.jsonl").read_text().splitlines()]


def test_every_row_is_judged_and_flagged_rows_are_quarantined_not_absorbed(
    pair: ModelPair, bank: Bank, state: WatchState, tmp_path: Path
) -> None:
    log = [*rows(150, 1), *rows(30, 2, start=151, odd=True)]
    verdicts = watch(pair, bank, state, log, tmp_path)
    assert [t["line"] for t in verdicts] == list(range(1, 181)) and state.seen == 180
    flagged = [t for t in verdicts if t["flagged"]]
    assert state.flagged == len(flagged) and state.scores.n == state.drift.n == 180 - len(flagged)
    assert sum(t["flagged"] for t in verdicts[:150]) <= 22  # .05 of 150, with room for two random draws
    assert sum(t["flagged"] for t in verdicts[150:]) > 8
    assert all((t["p_value"] <= FPR) == t["flagged"] and t["coverage"] == 1 for t in verdicts)
    with Ledger(f"sqlite:///{tmp_path / 'alerts.sqlite'}") as ledger:
        alerts = ledger.recent(1000)
    assert {a.request for a in alerts} == {f"line {t['line']}" for t in flagged}
    for alert in alerts:
        verdict = next(t for t in flagged if f"line {t['line']}" == alert.request)
        assert alert.direction in verdict["direction"] and alert.span[0] == verdict["token"]
        assert len(alert.tokens) == len(alert.token_scores) > 0
        assert alert.answer is not None and alert.answer_without is not None
        assert "".join(alert.tokens).endswith(alert.answer)


def test_a_killed_watch_goes_on_to_the_same_bytes(
    pair: ModelPair, bank: Bank, state: WatchState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 32)
    log = [*rows(60, 1), *rows(40, 2, start=61, odd=True)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    state.save(tmp_path / "start.safetensors")
    expected = watch(pair, bank, state, log, whole)

    class Killed(BaseException):
        pass

    def fail_after(n: int):
        real, count = WatchState.save, [0]

        def save(self: WatchState, path: Path) -> None:
            count[0] += 1
            if count[0] == n:
                raise Killed  # the verdicts of this chunk are written, its state is not
            real(self, path)

        return save

    again = WatchState.load(tmp_path / "start.safetensors", IDENTITY)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(WatchState, "save", fail_after(3))
        watch(pair, bank, again, log, parts)
    resumed = WatchState.load(parts / "state.safetensors", IDENTITY)
    assert resumed.seen == 64 and resumed.place == Place(640, 64)
    assert watch(pair, bank, resumed, log[64:], parts) == expected
    assert (whole / "verdicts.jsonl").read_bytes() == (parts / "verdicts.jsonl").read_bytes()
    assert resumed.drift.to_dict() == state.drift.to_dict() and resumed.flagged == state.flagged
    assert (whole / FILE).read_bytes() == (parts / FILE).read_bytes()  # the chunk that came twice counts once
    for folder in (whole, parts):
        with Ledger(f"sqlite:///{folder / 'alerts.sqlite'}") as ledger:
            assert len(ledger.recent(1000)) == state.flagged


def test_inputs_are_kept_by_direction_and_flagged_ones_apart(
    pair: ModelPair, bank: Bank, state: WatchState, tmp_path: Path
) -> None:
    log = [*rows(60, 1), *rows(30, 2, start=61, odd=True)]
    verdicts = watch(pair, bank, state, log, tmp_path)
    flagged = {t["line"] for t in verdicts if t["flagged"]}
    columns = len(bank.names)
    inputs = Inputs.load(tmp_path, IDENTITY, columns)
    profiles = [profile.prefixes[-1] for _, _, profile in read_answers(pair, bank, log, max_new_tokens=4, what="again")]
    values = torch.stack(profiles)
    for extremes, mine in ((inputs.unflagged, set(range(1, 91)) - flagged), (inputs.quarantined, flagged)):
        lines = sorted(mine)
        for end in (0, columns - 1, columns, 2 * columns - 1):
            of_end = values[[line - 1 for line in lines], end]
            found = extremes.end(end % columns, high=end < columns)
            assert len(found) == min(KEPT, len(lines)) and {one.row for one in found} <= mine
            sign = 1 if end < columns else -1
            torch.testing.assert_close(
                torch.tensor([sign * one.value for one in found]), of_end.sort(descending=True).values[: len(found)]
            )
            assert all(
                (one.prompt, one.answer) == (log[one.row - 1].turns[0].text, log[one.row - 1].response) for one in found
            )
    for line in verdicts:  # the row that set off an alarm is among those furthest out where it did
        if line["flagged"]:
            end = inputs.quarantined.end(bank.names.index(line["direction"]), high=line["side"] == "high")
            assert len(flagged) > KEPT or line["line"] in {one.row for one in end}


def test_the_whole_prompts_of_all_rows_are_kept_for_the_words_of_the_ends(
    pair: ModelPair, bank: Bank, state: WatchState, tmp_path: Path
) -> None:
    log = [*rows(20, 1), *rows(10, 2, start=21, odd=True)]
    log[3] = replace(log[3], turns=(Turn("user", " ".join(f"a{i}" for i in range(200))),))
    watch(pair, bank, state, log, tmp_path)
    kept = Inputs.load(tmp_path, IDENTITY, len(bank.names)).prompts
    assert set(kept.texts.values()) == {row.turns[0].text for row in log}
    assert set(kept.extremes.rows.unique().tolist()) <= kept.texts.keys() | {0}


def test_without_text_no_file_holds_any(pair: ModelPair, bank: Bank, state: WatchState, tmp_path: Path) -> None:
    log = [*rows(20, 1), *rows(10, 2, start=21, odd=True)]
    watch(pair, bank, state, log, tmp_path, no_text=True)
    stored = (tmp_path / FILE).read_bytes()
    assert not any(
        row.turns[0].text.encode() in stored or row.response.encode() in stored for row in log if len(row.response) > 5
    )
    found = Inputs.load(tmp_path, IDENTITY, len(bank.names)).unflagged.end(0, high=True)
    assert len(found) == KEPT and all(one.prompt == one.answer == "" for one in found)


def test_answers_that_were_not_logged_are_generated(pair: ModelPair, bank: Bank) -> None:
    unanswered = [Conversation(turns=r.turns, response=None, tag="", line=r.line, end=r.end) for r in rows(5, 3)]
    track = WatchedTrack()
    found = read_answers(pair, bank, [*unanswered, *rows(2, 4)], max_new_tokens=6, track=track, what="x")
    scoring = next(call for call in track.calls if call.what == "x: scoring")
    assert (scoring.total, scoring.done, scoring.unit) == (len(found), len(found), "rows")
    assert all(1 <= len(answer) <= 6 for _, answer, _ in found[:5])
    assert [profile.tokens for _, _, profile in found] == [max(1, len(answer)) for _, answer, _ in found]


def test_a_state_comes_back_and_another_models_is_refused(state: WatchState, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    state.save(path)
    again = WatchState.load(path, IDENTITY)
    assert again.monitor.calibration.equal(state.monitor.calibration)
    assert again.monitor.threshold == state.monitor.threshold
    assert again.suspects == state.suspects is not None
    assert again.rng.random() == state.rng.random() and again.place == state.place
    with pytest.raises(UsageError, match=r"calibrated for another tokenizer\."):
        WatchState.load(path, {**IDENTITY, "tokenizer": "c"})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InvalidInput, match="is no state of a watch"):
        WatchState.load(path, IDENTITY)
    save_file({"a": torch.zeros(1)}, path, {"molehunt_watch": json.dumps({"schema": 99})})
    with pytest.raises(InvalidInput, match="it is of schema 99"):
        WatchState.load(path, IDENTITY)
    odd = replace(
        state.monitor,
        by_stratum=(StratumCalibration((PrefixScore(RangeExceedance(torch.zeros(2)), 0.0, 1.0),), torch.zeros(1)),),
    )
    with pytest.raises(TypeError, match="tail sums"):
        WatchState(identity=IDENTITY, monitor=odd, drift=DriftMartingale(), rng=np.random.default_rng(0)).save(path)


def test_a_rate_that_the_clean_rows_cannot_hold_abstains(pair: ModelPair, bank: Bank) -> None:
    with pytest.raises(NotTestable, match=r"cannot hold a false-positive rate of 0\.001"):
        calibrate(pair, bank, rows(300, 0), fpr=0.001, identity=IDENTITY, max_new_tokens=4, seed=0)
