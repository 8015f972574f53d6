"""Clean rows that may hold the behaviour: found by the pair, set excluded, suspects_text."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.model.pair import ModelPair
from molehunt.model.roles import roled_prompt
from molehunt.report.watch_text import suspects as suspects_text
from molehunt.watch import calibration as module
from molehunt.watch.bank import Bank
from molehunt.watch.calibration import calibrate
from molehunt.watch.state import WatchState
from molehunt.watch.suspects import FACTOR, LEAST_NATS, answer_log_ratios, suspicious
from watched_logs import IDENTITY, rows


@given(st.lists(st.floats(-50, 50), min_size=10, max_size=60), st.integers(1, 3))
def test_rows_are_held_to_what_is_usual_for_their_kind(ratios: list[float], kinds: int) -> None:
    of = [i % kinds for i in range(len(ratios))]
    limits, found = suspicious(ratios, of)
    for kind, limit in enumerate(limits):
        some = torch.tensor([r for r, k in zip(ratios, of, strict=True) if k == kind], dtype=torch.float64)
        assert limit == max(LEAST_NATS, FACTOR * float(some.quantile(0.9)))
    assert set(found) == {i for i, ratio in enumerate(ratios) if ratio > limits[of[i]]}
    assert [ratios[i] for i in found] == sorted((ratios[i] for i in found), reverse=True)


def test_leaks_of_every_strength_are_found_and_a_heavy_tail_is_not() -> None:
    usual = [0.1 * (i % 60) for i in range(1000)]  # up to 6 nats
    leaks = [25.0 + i for i in range(50)]
    limits, found = suspicious([*usual, *leaks], [0] * 1050)
    assert len(limits) == 1 and sorted(found) == list(range(1000, 1050))
    assert suspicious([5 * value for value in usual], [0] * 1000)[1] == []
    with pytest.raises(ValueError, match="no clean row"):
        suspicious([], [])


def test_log_ratios_are_those_of_one_row_at_a_time(pair: ModelPair) -> None:
    tokenize = pair.tokenizer.encode
    prompts = [tokenize(row.turns[0].text) for row in rows(5, 0)]
    answers = [tokenize(row.response or "")[:4] for row in rows(5, 1)]
    answers[2] = []
    found = answer_log_ratios(pair, prompts, answers)
    for prompt, answer, ratio in zip(prompts, answers, found, strict=True):
        each = []
        for side in (pair.tuned_model(), pair.base_model()):
            with side as model, torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
            each.append(sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
        assert ratio == pytest.approx(each[0] - each[1], abs=1e-4)
    assert found[2] == 0


def test_suspicious_rows_leave_the_calibration_unless_they_are_trusted(
    pair: ModelPair, bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = rows(400, 0)
    bad = {clean[i].turns[0].text for i in range(0, 400, 20)}

    def ratios(pair: ModelPair, prompts, answers, **_) -> list[float]:
        return [90.0 if pair.tokenizer.decode(prompt) in bad else 1.0 for prompt in prompts]

    def state(**how) -> WatchState:
        return calibrate(pair, bank, clean, fpr=0.05, identity=IDENTITY, max_new_tokens=4, seed=0, **how)

    decoded = {pair.tokenizer.decode(roled_prompt(pair.tokenizer, row.turns).ids) for row in clean}
    bad = {text for text in decoded if any(one in text for one in bad)}
    monkeypatch.setattr(module, "answer_log_ratios", ratios)
    excluded, kept = state(), state(trust=True)
    for one, n in ((excluded, 400 - len(bad)), (kept, 400)):
        found = one.suspects
        assert found is not None and found.n == len(bad) == 20 and found.clean == 400
        assert found.trusted == (n == 400) and found.limits == (LEAST_NATS,)
        assert {row.nats for row in found.rows} == {90.0} and all(row.text for row in found.rows)
        assert found.flagged_with <= found.flagged_without + 1
    assert excluded.suspects is not None and kept.suspects is not None
    monkeypatch.setattr(module, "answer_log_ratios", lambda pair, prompts, answers, **_: [0.0] * len(prompts))
    plain = state()
    assert plain.suspects is not None and plain.suspects.n == 0 and suspects_text(plain.suspects) == ""
    assert kept.monitor.calibration.equal(plain.monitor.calibration)
    assert len(excluded.monitor.calibration) < len(kept.monitor.calibration)
    assert "is not calibrated on them" in suspects_text(excluded.suspects) and "--trust-clean" in suspects_text(
        excluded.suspects
    )
    assert "is calibrated on them all the same" in suspects_text(kept.suspects)
    counts = (
        f"It flags {excluded.suspects.flagged_without} of the 20; .* would flag {excluded.suspects.flagged_with}\\."
    )
    assert re.search(counts, suspects_text(excluded.suspects))
    listed = re.search(r"Lines: ([\d, ]+) and 4 more", suspects_text(excluded.suspects))
    assert listed is not None
    lines = [int(one) for one in listed[1].split(", ")]
    assert lines == sorted(lines) and lines != [one.line for one in excluded.suspects.rows]
    excluded.save(tmp_path / "state.safetensors")
    assert WatchState.load(tmp_path / "state.safetensors", IDENTITY).suspects == excluded.suspects
    monkeypatch.setattr(module, "answer_log_ratios", ratios)
    silent = state(no_text=True).suspects
    assert silent is not None and silent == replace(
        excluded.suspects, rows=tuple(replace(row, text="") for row in excluded.suspects.rows)
    )
