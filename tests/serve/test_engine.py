"""Guarded decoding: answers are those of the model, every token is scored, and what is flagged is acted upon."""

import queue
from dataclasses import replace

import pytest
import torch

from guarded import PROMPTS, Heard, generation, guard_of, run, tiny_pair
from molehunt.model.decoding import DecodingBatch
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.model.sampling import Sampling
from molehunt.serve.engine import Engine
from molehunt.serve.request import Ended, Failed, Overloaded
from molehunt.watch.answers import answer_profiles
from molehunt.watch.bank import Bank
from molehunt.watch.ledger import Ledger, LedgerUnavailable
from molehunt.watch.state import WatchState


def test_rows_that_join_and_leave_decode_as_they_would_alone(pair: ModelPair) -> None:
    model = pair._tuned
    expected = generate(model, pair.tokenizer, PROMPTS, max_new_tokens=6, stop=[], batch_size=1)
    batch = DecodingBatch(model)
    got: dict[int, list[int]] = {}
    live: list[int] = []
    for first in (0, 2, 4):  # two rows join every two steps
        new = list(range(first, min(first + 2, len(PROMPTS))))
        joined = DecodingBatch(model)
        drawn = joined.begin([PROMPTS[i] for i in new]).argmax(-1).tolist()
        for i, token in zip(new, drawn, strict=True):
            got[i] = [token]
        batch.join(joined)
        live += new
        for _ in range(2):
            tokens = batch.step(torch.tensor([got[i][-1] for i in live])).argmax(-1).tolist()
            for i, token in zip(live, tokens, strict=True):
                got[i].append(token)
            kept = [r for r, i in enumerate(live) if len(got[i]) < 6]
            live = [live[r] for r in kept]
            batch.keep(torch.tensor(kept))
    assert len(batch) == len(live)
    for i, answer in got.items():
        assert answer == expected[i][: len(answer)] and len(answer) >= 3


def test_answers_are_the_models_own_and_verdicts_those_of_a_teacher_forced_pass(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger
) -> None:
    guard = guard_of(pair, bank, calibrated_state, ledger)
    heard = run(pair, guard, [generation(prompt) for prompt in PROMPTS], max_batch=2)
    answers = generate(pair._tuned, pair.tokenizer, PROMPTS, max_new_tokens=8, batch_size=1)
    expected = answer_profiles(pair._tuned, bank, PROMPTS, answers)
    for one, answer, profile, prompt in zip(heard, answers, expected, PROMPTS, strict=True):
        end = one.end
        assert end.answer_tokens == len(answer) and end.prompt_tokens == len(prompt)
        assert one.text == pair.tokenizer.decode(answer, skip_special_tokens=True)
        judged = calibrated_state.monitor.judge(profile)
        assert end.verdict.score == pytest.approx(judged.score, abs=1e-3)
        assert end.verdict.coverage == 1 and end.verdict.flagged == (judged.score > guard.threshold)


def test_a_replayed_prompt_keeps_its_coverage_and_its_verdict(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger
) -> None:
    guard = guard_of(pair, bank, calibrated_state, ledger)
    heard = run(pair, guard, [replace(generation(PROMPTS[1]), id=str(i)) for i in range(5)], max_batch=1)
    assert {one.end.verdict.coverage for one in heard} == {1.0}
    assert len({round(one.end.verdict.score or 0, 4) for one in heard}) == 1


@pytest.mark.parametrize("action", ["log", "flag", "block", "steer"])
def test_a_flagged_answer_is_recorded_and_acted_upon(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger, action: str
) -> None:
    guard = guard_of(pair, bank, calibrated_state, ledger, action=action, threshold=-1e9)  # everything is beyond it
    (heard,) = run(pair, guard, [generation(PROMPTS[0])])
    (plain,) = generate(pair._tuned, pair.tokenizer, PROMPTS[:1], max_new_tokens=8)
    reported = heard.end.verdict
    (alert,) = ledger.recent(5)
    assert reported.flagged and reported.alert == alert.id and alert.action == action and reported.coverage == 1
    text = pair.tokenizer.decode(plain, skip_special_tokens=True)
    if action == "block":
        assert heard.text == "" and heard.end.reason == "content_filter" and heard.end.answer_tokens == 0
    elif action == "steer":
        assert heard.text != text and heard.end.reason in ("stop", "length")
    else:
        assert heard.text == text
    assert ("flagged" in reported.to_dict()) == (action != "log")


def test_steering_one_row_leaves_its_batch_mates_alone(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger
) -> None:
    scores = [
        calibrated_state.monitor.judge(profile).score
        for profile in answer_profiles(
            pair._tuned, bank, PROMPTS, generate(pair._tuned, pair.tokenizer, PROMPTS, max_new_tokens=8)
        )
    ]
    highest = max(range(len(scores)), key=scores.__getitem__)
    between = sum(sorted(scores)[-2:]) / 2
    guard = guard_of(pair, bank, calibrated_state, ledger, action="steer", threshold=between)
    heard = run(pair, guard, [generation(prompt) for prompt in PROMPTS])
    plain = generate(pair._tuned, pair.tokenizer, PROMPTS, max_new_tokens=8)
    for i, (one, answer) in enumerate(zip(heard, plain, strict=True)):
        assert one.end.verdict.flagged == (i == highest)
        if i != highest:
            assert one.text == pair.tokenizer.decode(answer, skip_special_tokens=True)


def test_nan_is_not_answered_and_counts_as_not_covered(
    bank: Bank, calibrated_state: WatchState, ledger: Ledger
) -> None:
    pair = tiny_pair()
    with torch.no_grad():
        pair._tuned.get_parameter("model.layers.0.mlp.down_proj.weight").fill_(torch.nan)
    guard = guard_of(pair, bank, calibrated_state, ledger)
    (heard,) = run(pair, guard, [generation(PROMPTS[0])])
    assert heard.text == "" and heard.end.reason == "content_filter"
    assert heard.end.verdict.flagged and heard.end.verdict.coverage == 0 and heard.end.verdict.score is None


def test_an_alert_that_cannot_be_stored_is_a_failure_not_an_answer(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(alert: object) -> None:
        raise LedgerUnavailable("the disk is full")

    monkeypatch.setattr(ledger, "record", full)
    guard = guard_of(pair, bank, calibrated_state, ledger, threshold=-1e9)
    (heard,) = run(pair, guard, [generation(PROMPTS[0])])
    assert isinstance(heard.last, Failed) and not guard.healthy


def test_seeded_sampling_repeats_itself_in_any_company(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger
) -> None:
    drawn = Sampling(temperature=1.0, top_p=0.9, seed=7)
    alone = run(pair, guard_of(pair, bank, calibrated_state, ledger), [generation(PROMPTS[0], sampling=drawn)])
    mates = [generation(prompt, sampling=Sampling(temperature=1.5)) for prompt in PROMPTS[1:]]
    company = run(
        pair, guard_of(pair, bank, calibrated_state, ledger), [generation(PROMPTS[0], sampling=drawn), *mates]
    )
    assert alone[0].text == company[0].text
    other = run(
        pair, guard_of(pair, bank, calibrated_state, ledger), [generation(PROMPTS[0], sampling=replace(drawn, seed=8))]
    )
    assert other[0].text != alone[0].text


def test_log_probabilities_are_the_models(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger
) -> None:
    (heard,) = run(pair, guard_of(pair, bank, calibrated_state, ledger), [generation(PROMPTS[0], 4, logprobs=3)])
    answer = [one.token for one in heard.logprobs]
    with torch.inference_mode():
        logits = pair._tuned(input_ids=torch.tensor([[*PROMPTS[0], *answer]])).logits[0].log_softmax(-1)
    for i, one in enumerate(heard.logprobs):
        row = logits[len(PROMPTS[0]) - 1 + i]
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
        assert [token for token, _ in one.top] == row.topk(3).indices.tolist()


def test_a_stop_string_ends_the_answer_before_it(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger
) -> None:
    (whole,) = run(pair, guard_of(pair, bank, calibrated_state, ledger), [generation(PROMPTS[0], 12)])
    assert len(whole.text) >= 6
    stop = whole.text[3:5]
    (cut,) = run(pair, guard_of(pair, bank, calibrated_state, ledger), [generation(PROMPTS[0], 12, stop=(stop,))])
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.end.reason == "stop"


def test_who_leaves_is_still_judged_and_who_waits_too_long_is_refused(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger
) -> None:
    guard = guard_of(pair, bank, calibrated_state, ledger)
    engine = Engine(pair._tuned, pair.tokenizer, guard, max_batch=1, max_waiting=1)
    first = Heard()
    engine.submit(generation(PROMPTS[0], 400), first)
    first.wait_for_text()
    waiting = Heard()
    engine.submit(generation(PROMPTS[1]), waiting)
    with pytest.raises(Overloaded, match="wait already"):
        engine.submit(generation(PROMPTS[2]), Heard())
    engine.cancel(generation(PROMPTS[0], 400).id)
    engine.close()
    guard.close()
    assert first.end.reason == "cancelled" and first.end.answer_tokens < 400 and first.end.verdict.coverage == 1
    assert isinstance(waiting.last, Ended)
    with pytest.raises(Overloaded, match="shutting down"):
        engine.submit(generation(PROMPTS[2]), Heard())


def test_explanations_come_when_nobody_waits(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger
) -> None:
    guard = guard_of(pair, bank, calibrated_state, ledger, threshold=-1e9)
    engine = Engine(pair._tuned, pair.tokenizer, guard)
    heard = Heard()
    engine.submit(generation(PROMPTS[1]), heard)
    heard.wait()
    explained = queue.Queue[object]()
    for _ in range(200):
        (alert,) = ledger.recent(2)
        if alert.answer_without is not None:
            explained.put(alert)
            break
        heard.sleep()
    engine.close()
    guard.close()
    assert not explained.empty() and len(alert.tokens) == len(alert.token_scores) > 0
    assert alert.answer_without != alert.answer and len(alert.extremes) == 3


def test_a_request_that_breaks_the_model_is_told_and_the_next_one_is_answered(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = guard_of(pair, bank, calibrated_state, ledger)
    begin = DecodingBatch.begin

    def breaks_once(batch: DecodingBatch, prompts: list[tuple[int, ...]]) -> torch.Tensor:
        monkeypatch.setattr(DecodingBatch, "begin", begin)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DecodingBatch, "begin", breaks_once)
    engine = Engine(pair._tuned, pair.tokenizer, guard)
    broken, fine = Heard(), Heard()
    engine.submit(generation(PROMPTS[0]), broken)
    broken.wait()
    engine.submit(generation(PROMPTS[1]), fine)
    engine.close()
    guard.close()
    assert isinstance(broken.last, Failed) and "memory" not in broken.last.message
    assert fine.end.answer_tokens > 0 and fine.end.verdict.coverage == 1
