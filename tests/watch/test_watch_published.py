"""The published monitor: what it reads, flags, absorbs, promises and keeps."""

import json
from pathlib import Path

import pytest
import torch

from molehunt.errors import InvalidInput, NotTestable, UsageError
from molehunt.model.pair import ModelPair
from molehunt.model.roles import roled_prompt
from molehunt.traffic.stream import Conversation
from molehunt.watch import judge as judge_module
from molehunt.watch import log as log_module
from molehunt.watch.answers import token_columns
from molehunt.watch.bank import Bank
from molehunt.watch.calibration import calibrate as calibrate_monitor
from molehunt.watch.extremes import Inputs
from molehunt.watch.ledger import Ledger
from molehunt.watch.log import watch_log
from molehunt.watch.published import (
    FILE,
    ROLES,
    PublishedState,
    RoleRead,
    calibrated_range,
    read_roles,
    role_names,
    watch_published,
    written_alone,
)
from watched_logs import IDENTITY, rows


def calibrate(pair: ModelPair, bank: Bank, clean: list[Conversation], **options: float) -> PublishedState:
    settings = {"slack": 0.01, "percentile": 0.0, **options}
    return calibrated_range(pair, bank, clean, identity=IDENTITY, max_new_tokens=4, seed=0, **settings)


def watch(pair: ModelPair, bank: Bank, state: PublishedState, log: list[Conversation], into: Path) -> list[dict]:
    inputs = Inputs.load(into, IDENTITY, len(role_names(bank)))
    watch_published(pair, bank, state, inputs, log, max_new_tokens=4, into=into)
    return [json.loads(line) for line in (into / "verdicts.jsonl").read_text().splitlines()]


def test_every_token_of_a_role_counts_and_no_other(pair: ModelPair, bank: Bank) -> None:
    log = rows(6, 5)
    read = read_roles(pair, bank, log, max_new_tokens=4, what="x")
    names = role_names(bank)
    assert len(names) == 2 * bank.written and names[0].endswith(", prompt") and names[-1].endswith(", answer")
    for row, one in zip(log, read, strict=True):
        ids = roled_prompt(pair.tokenizer, row.turns).ids
        assert one.prompt == ids and pair.tokenizer.decode(list(one.answer)) == row.response
        with pair.tuned_model() as model:
            cosines = token_columns(model, written_alone(bank), (*one.prompt, *one.answer))
        prompt, answer = cosines[: len(ids)], cosines[len(ids) :]
        expected = torch.cat([prompt.amax(0), answer.amax(0), -prompt.amin(0), -answer.amin(0)])
        torch.testing.assert_close(one.ends, expected, rtol=0, atol=1e-5)
        for end in range(0, len(one.ends), 7):
            column, value = end % len(names) % bank.written, one.ends[end]
            there = cosines[one.token(end), column]
            torch.testing.assert_close(there if end < len(names) else -there, value, rtol=0, atol=1e-5)


def test_an_answer_without_tokens_leaves_no_range(pair: ModelPair, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "generate", lambda model, tokenizer, prompts, **_: [[] for _ in prompts])
    asked = [Conversation(turns=r.turns, response=None, tag="", line=r.line, end=r.end) for r in rows(4, 3)]
    silent = read_roles(pair, bank, asked[:1], max_new_tokens=4, what="x")[0]
    assert silent.of_answer is None and silent.answer == ()
    directions = bank.written
    answer_ends = torch.cat([silent.ends[directions : 2 * directions], silent.ends[3 * directions :]])
    assert bool((answer_ends == -torch.inf).all()) and bool(silent.ends[:directions].isfinite().all())
    with pytest.raises(ValueError, match="no answer"):
        silent.token(directions)
    state = calibrate(pair, bank, rows(40, 0))
    before = state.ranges[1].n
    assert (
        float(state.beyond(silent).max()) < torch.inf
        and int(state.beyond(silent).argmax()) % (2 * directions) < directions
    )
    state.absorb(silent)
    assert state.ranges[0].n == 41 and state.ranges[1].n == before
    with pytest.raises(NotTestable):  # nothing is known of answers
        calibrate(pair, bank, asked * 5)


def test_what_leaves_the_range_is_flagged_once_and_then_normal(pair: ModelPair, bank: Bank, tmp_path: Path) -> None:
    state = calibrate(pair, bank, rows(200, 0))
    odd = rows(8, 2, start=41, odd=True)
    again = [Conversation(turns=r.turns, response=r.response, tag=r.tag, line=r.line + 8, end=r.end) for r in odd]
    log = [*rows(40, 1), *odd, *again]
    reference = calibrate(pair, bank, rows(200, 0))
    verdicts = watch(pair, bank, state, log, tmp_path)
    assert [t["line"] for t in verdicts] == list(range(1, 57)) and state.seen == 56 == state.ranges[0].n - 200
    assert state.calibration_rows == 200 and state.flagged == sum(t["flagged"] for t in verdicts)
    assert sum(t["flagged"] for t in verdicts[40:48]) > 4 and not any(t["flagged"] for t in verdicts[48:])
    names = role_names(bank)
    for line, one in zip(verdicts, read_roles(pair, bank, log, max_new_tokens=4, what="x"), strict=True):
        beyond = reference.beyond(one)
        assert line["score"] == pytest.approx(float(beyond.max()), rel=1e-3, abs=1e-6)
        assert line["flagged"] == (line["score"] > 0) and line["p_value"] is None
        end = int(beyond.argmax())
        assert (line["direction"], line["side"]) == (names[end % len(names)], "high" if end < len(names) else "low")
        assert line["token"] == one.token(end) < line["tokens"] == len(one.prompt) + len(one.answer)
        assert (line["token"] >= len(one.prompt)) == line["direction"].endswith(ROLES[1])
        reference.absorb(one)
    inputs = Inputs.load(tmp_path, IDENTITY, len(names))
    flagged = {t["line"] for t in verdicts if t["flagged"]}
    assert set(inputs.quarantined.rows.unique().tolist()) - {0} <= flagged
    assert not flagged & set(inputs.unflagged.rows.unique().tolist())
    assert set(inputs.prompts.texts.values()) == {row.turns[0].text for row in log}


def test_the_lines_have_the_shape_of_the_other_mode(pair: ModelPair, bank: Bank, tmp_path: Path) -> None:
    (line,) = watch(pair, bank, calibrate(pair, bank, rows(40, 0)), rows(1, 1), tmp_path)
    other = tmp_path / "conformal"
    other.mkdir()
    state = calibrate_monitor(pair, bank, rows(400, 0), fpr=0.05, identity=IDENTITY, max_new_tokens=4, seed=0)
    with Ledger(f"sqlite:///{other / 'alerts.sqlite'}") as ledger:
        inputs = Inputs.empty(len(bank.names))
        watch_log(pair, bank, state, inputs, rows(1, 1), fpr=0.05, max_new_tokens=4, into=other, ledger=ledger)
    assert list(line) == list(json.loads((other / "verdicts.jsonl").read_text()))


def test_slack_and_percentile_do_what_they_say(pair: ModelPair, bank: Bank, tmp_path: Path) -> None:
    log = [*rows(40, 1), *rows(20, 2, start=41, odd=True)]
    flags = {}
    for name, options in {"plain": {}, "wide": {"slack": 0.5}, "narrow": {"slack": 0.0, "percentile": 0.2}}.items():
        (tmp_path / name).mkdir()
        state = calibrate(pair, bank, rows(100, 0), **options)
        flags[name] = [t["flagged"] for t in watch(pair, bank, state, log, tmp_path / name)]
    assert sum(flags["wide"]) < sum(flags["plain"]) < sum(flags["narrow"])


def test_false_alarms_are_measured_on_rows_that_the_range_has_not_seen(pair: ModelPair, bank: Bank) -> None:
    clean = rows(200, 0)
    state = calibrate(pair, bank, clean)
    assert len(state.held_out) == 20 and state.ranges[0].n == 200
    assert state.bound == pytest.approx(2 * 2 * bank.written / 180)
    tight = calibrate(pair, bank, clean, slack=0.0)
    assert (tight.held_out > 0).sum() > (state.held_out > 0).sum() or (state.held_out < 0).all()
    torch.testing.assert_close(tight.held_out, state.held_out + 0.01, rtol=0, atol=1e-9)
    assert (calibrate(pair, bank, clean, slack=2.0).held_out < 0).all()
    with pytest.raises(NotTestable, match="9 clean rows are too few"):
        calibrate(pair, bank, clean[:9])


def test_a_killed_watch_goes_on_to_the_same_bytes(
    pair: ModelPair, bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "CHUNK", 16)
    log = [*rows(30, 1), *rows(18, 2, start=31, odd=True)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    state = calibrate(pair, bank, rows(100, 0))
    state.save(parts / FILE)
    expected = watch(pair, bank, state, log, whole)

    class Killed(BaseException):
        pass

    real, count = PublishedState.save, [0]

    def save(self: PublishedState, path: Path) -> None:
        count[0] += 1
        if count[0] == 2:
            raise Killed  # the verdicts of this chunk are written, its range is not
        real(self, path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PublishedState, "save", save)
        watch(pair, bank, PublishedState.load(parts / FILE, IDENTITY), log, parts)
    resumed = PublishedState.load(parts / FILE, IDENTITY)
    assert resumed.seen == 16 and resumed.place == log[15].end and resumed.calibration_rows == 100
    assert watch(pair, bank, resumed, log[16:], parts) == expected
    assert all(
        (whole / name).read_bytes() == (parts / name).read_bytes() for name in ("verdicts.jsonl", "inputs.safetensors")
    )
    assert torch.equal(resumed.held_out, state.held_out) and resumed.bound == state.bound
    for a, b in zip(resumed.ranges, state.ranges, strict=True):
        assert torch.equal(a.high, b.high) and torch.equal(a.low, b.low) and (a.slack, a.n) == (b.slack, b.n)


def test_another_watchs_range_and_a_broken_one_are_refused(pair: ModelPair, bank: Bank, tmp_path: Path) -> None:
    path = tmp_path / FILE
    state = calibrate(pair, bank, rows(20, 0), percentile=0.1)
    state.save(path)
    assert PublishedState.load(path, IDENTITY).ranges[1].percentile == 0.1
    with pytest.raises(UsageError, match="made for another tokenizer"):
        PublishedState.load(path, {**IDENTITY, "tokenizer": "c"})
    state.ranges[0].slack = -1.0  # what no range has
    state.save(path)
    with pytest.raises(InvalidInput, match="is no published range of a watch"):
        PublishedState.load(path, IDENTITY)
    path.write_bytes(b"")
    with pytest.raises(InvalidInput, match="is no published range of a watch"):
        PublishedState.load(path, IDENTITY)


def test_a_row_is_read_by_roles(pair: ModelPair, bank: Bank) -> None:
    found = read_roles(pair, bank, rows(1, 0), max_new_tokens=4, what="x")
    assert isinstance(found[0], RoleRead) and found[0].roles == (found[0].of_prompt, found[0].of_answer)
    assert read_roles(pair, bank, [], max_new_tokens=4, what="x") == []
