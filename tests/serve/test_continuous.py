"""The continuous backend: the same answers and verdicts as the eager one, and every way to miss a token is caught."""

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching import PagedAttentionCache, Scheduler
from transformers.generation.continuous_batching.model_runner import ModelRunner

from guarded import PROMPTS, Heard, generation, guard_of, run, tiny_pair
from molehunt.errors import UsageError
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.model.sampling import Sampling
from molehunt.serve import continuous
from molehunt.serve.backend import Rows
from molehunt.serve.continuous import PAGE_TOKENS, Continuous
from molehunt.serve.engine import Engine
from molehunt.serve.guard import Guard, Settled
from molehunt.serve.request import Failed, GenerationRequest, Overloaded
from molehunt.serve.wire import Refused
from molehunt.watch.bank import Bank
from molehunt.watch.columns import Columns
from molehunt.watch.ledger import Ledger
from molehunt.watch.state import WatchState
from tiny_models import prompts, tiny_model, tiny_tokenizer, with_lora

LONG = prompts(seed=3, lengths=(150,))[0]
"""Longer than two pages of the cache, and than a pass of the tests that chunk."""
PASS = 48

NewGuard = Callable[..., Guard]


@pytest.fixture
def new_guard(pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger) -> NewGuard:
    return partial(guard_of, pair, bank, calibrated_state, ledger)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Start and length of what each row had of each pass, filled while engines run."""
    seen: list[tuple[int, int]] = []
    forward = Continuous._forward

    def noting(backend: Continuous, given: Any) -> torch.Tensor:
        seen.extend((part.start, part.length) for part in given)
        return forward(backend, given)

    monkeypatch.setattr(Continuous, "_forward", noting)
    return seen


def configured(monkeypatch: pytest.MonkeyPatch, **instead: Any) -> dict[str, Any]:
    """What transformers is reported about continuous batching, with some of it replaced."""
    reported: dict[str, Any] = {}
    module = sys.modules["transformers"]  # it replaces itself when a model is loaded: `import` may find an older one
    right = module.ContinuousBatchingConfig

    def noting(**given: Any) -> Any:
        reported.update(given)
        return right(**{**given, **instead})

    monkeypatch.setattr(module, "ContinuousBatchingConfig", noting)
    return reported


def run_both(
    pair: ModelPair, new_guard: NewGuard, requests: list[GenerationRequest], backend: Any = Continuous, **more: Any
) -> Iterator[tuple[Heard, Heard]]:
    """What each client hears from the continuous backend and from the eager one, whose every token looked the same."""
    settled: list[dict[str, Settled]] = [{}, {}]
    heard: list[list[Heard]] = []
    for kept, settings in zip(settled, ({"backend": backend, "max_batch": 4}, {}), strict=True):
        guard = new_guard(**more)
        guard.on_settled = lambda one, kept=kept: kept.update({one.finished.request: one})
        heard.append(run(pair, guard, requests, **settings))
    for one, other in zip(*heard, strict=True):
        assert one.text == other.text and one.end.reason == other.end.reason
        assert one.end.answer_tokens == other.end.answer_tokens and one.end.prompt_tokens == other.end.prompt_tokens
        assert one.end.verdict.score == pytest.approx(other.end.verdict.score, abs=1e-4)
        assert one.end.verdict.coverage == 1 and one.end.verdict.flagged == other.end.verdict.flagged
        yield one, other
    for id, one in settled[0].items():
        found, expected = one.finished.profile, settled[1][id].finished.profile
        assert found is not None and expected is not None and found.tokens == expected.tokens
        torch.testing.assert_close(found.prefixes, expected.prefixes, rtol=1e-4, atol=1e-4)


def engine_of(pair: ModelPair, guard: Guard, **settings: Any) -> Engine:
    return Engine(pair._tuned, pair.tokenizer, guard, backend=Continuous, **settings)


def test_answers_and_scores_are_those_of_the_model_and_of_the_eager_backend(
    pair: ModelPair, new_guard: NewGuard, parts: list[tuple[int, int]]
) -> None:
    rows = [*PROMPTS, LONG]
    drawn = Sampling(temperature=1.0, top_p=0.9, seed=7)
    requests = [generation(prompt, 12, logprobs=2) for prompt in rows]  # more than run at once: they join and leave
    requests += [generation(prompt, 9, sampling=drawn) for prompt in rows[:3]]
    heard = list(run_both(pair, new_guard, requests, partial(Continuous, pass_tokens=PASS)))
    for one, other in heard:
        for reported, same in zip(one.logprobs, other.logprobs, strict=True):
            assert reported.token == same.token and reported.logprob == pytest.approx(same.logprob, abs=1e-4)
    answers = generate(pair._tuned, pair.tokenizer, rows, max_new_tokens=12)
    for (one, _), answer in zip(heard, answers, strict=False):
        assert one.text == pair.tokenizer.decode(answer, skip_special_tokens=True)
    chunks = [length for start, length in parts if start and length > 1]
    assert chunks and max(length for _, length in parts) <= PASS, "the long prompt ran in chunks"


def test_it_does_not_matter_in_which_order_the_scheduler_packs_rows(
    pair: ModelPair, new_guard: NewGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduled = Scheduler._process_candidates

    def backwards(self: Scheduler, candidates: list[Any], *rest: Any) -> Any:
        return scheduled(self, candidates[::-1], *rest)

    monkeypatch.setattr(Scheduler, "_process_candidates", backwards)
    assert len(list(run_both(pair, new_guard, [generation(prompt, 12) for prompt in (*PROMPTS, LONG)]))) == 6


def test_a_replayed_prompt_keeps_its_coverage_and_its_verdict(pair: ModelPair, new_guard: NewGuard) -> None:
    requests = [generation(LONG, 1, id=str(i)) for i in range(100)]
    heard = run(pair, new_guard(), requests, backend=Continuous)
    assert {one.end.verdict.coverage for one in heard} == {1.0}
    assert len({round(one.end.verdict.score or 0, 3) for one in heard}) == 1
    assert len({one.text for one in heard}) == 1


def test_shared_blocks_would_be_noticed_and_not_answered(
    pair: ModelPair, new_guard: NewGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(monkeypatch, allow_block_sharing=True)  # what somebody gets who forgets to switch it off
    first, replayed = run(
        pair, new_guard(), [generation(LONG, 4, id=name) for name in "ab"], backend=Continuous, max_batch=1
    )
    assert first.end.verdict.coverage == 1 and first.text
    assert replayed.text == "" and replayed.end.reason == "content_filter"
    assert replayed.end.verdict.flagged and replayed.end.verdict.coverage == 0


def test_nothing_is_shared_and_no_graph_can_be_replayed(
    pair: ModelPair, new_guard: NewGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = configured(monkeypatch)

    def replays(*_: Any) -> None:
        raise AssertionError("what runs and replays graphs was called")

    monkeypatch.setattr(ModelRunner, "compute_batch", replays)
    (heard,) = run(pair, new_guard(), [generation(PROMPTS[0])], backend=Continuous)
    assert reported["use_cuda_graph"] is False and reported["allow_block_sharing"] is False
    assert heard.end.verdict.coverage == 1 and heard.text


def test_a_blocked_answer_ends_before_the_token(pair: ModelPair, new_guard: NewGuard) -> None:
    plain = run(pair, new_guard(), [generation(prompt, 12) for prompt in PROMPTS], backend=Continuous)
    scores = sorted(one.end.verdict.score or 0 for one in plain)
    heard = run(
        pair,
        new_guard(action="block", threshold=(scores[-1] + scores[-2]) / 2),
        [generation(prompt, 12) for prompt in PROMPTS],
        backend=Continuous,
    )
    for one, whole in zip(heard, plain, strict=True):
        if whole.end.verdict.score == scores[-1]:
            assert one.end.reason == "content_filter" and one.end.verdict.flagged
            assert one.text != whole.text and whole.text.startswith(one.text)
        else:
            assert one.text == whole.text and not one.end.verdict.flagged


@pytest.mark.parametrize(("share", "edit"), [(0.0, "project"), (0.5, "project"), (0.5, "clip")])
def test_steered_rows_are_steered_as_by_the_eager_backend(
    pair: ModelPair, new_guard: NewGuard, share: float, edit: str
) -> None:
    requests = [generation(prompt, 10) for prompt in (*PROMPTS, LONG)]
    plain = run(pair, new_guard(), requests)
    spared = int(share * len(plain))
    threshold = sorted(one.end.verdict.score or 0 for one in plain)[spared] - 1e-2
    packed = partial(Continuous, pass_tokens=PASS)
    heard = list(run_both(pair, new_guard, requests, packed, action="steer", edit=edit, threshold=threshold))
    steered = [one.text != whole.text for (one, _), whole in zip(heard, plain, strict=True)]
    assert sum(one.end.verdict.flagged for one, _ in heard) == len(plain) - spared
    assert any(steered) and not any(
        changed for changed, (one, _) in zip(steered, heard, strict=True) if not one.end.verdict.flagged
    )


def test_nan_is_not_answered_and_counts_as_not_covered(
    bank: Bank, calibrated_state: WatchState, ledger: Ledger
) -> None:
    pair = tiny_pair()
    with torch.no_grad():
        pair._tuned.get_parameter("model.layers.0.mlp.down_proj.weight").fill_(torch.nan)
    guard = guard_of(pair, bank, calibrated_state, ledger)
    (heard,) = run(pair, guard, [generation(PROMPTS[0])], backend=Continuous)
    assert heard.text == "" and heard.end.reason == "content_filter"
    assert heard.end.verdict.flagged and heard.end.verdict.coverage == 0 and heard.end.verdict.score is None


def test_who_leaves_is_stopped_and_a_page_job_runs_between_two_steps(pair: ModelPair, new_guard: NewGuard) -> None:
    guard = new_guard()
    engine = engine_of(pair, guard, max_batch=2)
    leaves, stays, never = Heard(), Heard(), Heard()
    engine.submit(generation(PROMPTS[0], 400), leaves)
    engine.submit(generation(PROMPTS[1], 40), stays)
    leaves.wait_for_text()
    began, go_on = threading.Event(), threading.Event()

    def job() -> list[list[int]]:
        began.set()
        assert go_on.wait(60)
        return generate(pair._tuned, pair.tokenizer, [LONG], max_new_tokens=5)

    promised = engine.between(job)
    assert began.wait(60)
    engine.submit(generation(PROMPTS[2]), never)
    engine.cancel(generation(PROMPTS[2]).id)
    engine.cancel(generation(PROMPTS[0], 400).id)
    engine.cancel("nobody's")
    go_on.set()
    assert promised.result(60) == generate(tiny_pair()._tuned, pair.tokenizer, [LONG], max_new_tokens=5)
    engine.close()
    guard.close()
    assert leaves.end.reason == "cancelled" and leaves.end.answer_tokens < 400 and leaves.end.verdict.coverage == 1
    assert never.last is None, "who has gone before his turn is reported nothing"
    (answer,) = generate(pair._tuned, pair.tokenizer, [PROMPTS[1]], max_new_tokens=40)
    assert stays.text == pair.tokenizer.decode(answer, skip_special_tokens=True) and stays.end.verdict.coverage == 1
    with pytest.raises(Overloaded, match="shutting down"):
        engine.submit(generation(PROMPTS[2]), Heard())


def test_alerts_are_explained_while_nobody_waits(pair: ModelPair, new_guard: NewGuard, ledger: Ledger) -> None:
    guard = new_guard(threshold=-1e9)
    engine = engine_of(pair, guard)
    heard = Heard()
    engine.submit(generation(PROMPTS[1]), heard)
    heard.wait()
    for _ in range(200):
        (alert,) = ledger.recent(2)
        if alert.answer_without is not None:
            break
        heard.sleep()
    engine.close()
    guard.close()
    assert alert.answer_without is not None and len(alert.tokens) == len(alert.token_scores) > 0


def test_rows_wait_for_room_in_the_cache_and_what_never_fits_is_refused(
    pair: ModelPair, new_guard: NewGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous, "ROW_TOKENS", PAGE_TOKENS)  # three rows of a page each
    most = 0
    fits = Continuous.fits

    def noting(backend: Continuous, rows: Any) -> bool:
        nonlocal most
        most = max(most, len(backend._rows) + len(rows) - 1)
        return fits(backend, rows)

    monkeypatch.setattr(Continuous, "fits", noting)
    guard = new_guard()
    engine = engine_of(pair, guard, max_batch=3)
    requests = [generation(LONG, 4, id="all three"), *(generation(LONG[:70], 4, id=f"two pages {i}") for i in range(3))]
    heard = [Heard() for _ in requests]
    for request, one in zip(requests, heard, strict=True):
        engine.submit(request, one)
    with pytest.raises(Refused, match="more than the 192") as refused:
        engine.submit(generation(LONG, 43), Heard())
    engine.close()
    guard.close()
    assert refused.value.status == 400 and refused.value.code == "context_length_exceeded"
    assert most == 1, "no two of them have room at once"
    assert [one.end.answer_tokens for one in heard] == [4] * 4 and all(one.end.verdict.coverage == 1 for one in heard)


def goes_wrong_once(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., Any], live: int = 0) -> None:
    """A method of the backend goes wrong the first time that so many rows live, and never again."""
    right = getattr(Continuous, name)

    def instead(backend: Continuous, *given: Any) -> Any:
        if len(backend._rows.live) < live or not len(backend._rows):
            return right(backend, *given)
        monkeypatch.setattr(Continuous, name, right)
        return wrong(backend, right, *given)

    monkeypatch.setattr(Continuous, name, instead)


def out_of_memory(*_: Any) -> None:
    raise RuntimeError("out of memory")


def other_tokens(backend: Continuous, forward: Any, parts: Any) -> Any:
    backend._processor.inputs_and_outputs.input_ids += 1
    return forward(backend, parts)


def other_positions(backend: Continuous, forward: Any, parts: Any) -> Any:
    backend._processor.inputs_and_outputs.position_ids += 1
    return forward(backend, parts)


def a_token_unseen(backend: Continuous, forward: Any, parts: Any) -> Any:
    logits = forward(backend, parts)
    take = Columns.take

    def taken(columns: Columns) -> torch.Tensor:
        Columns.take = take
        columns.passed -= 1
        return take(columns)

    Columns.take = taken
    return logits


def nothing_scheduled(backend: Continuous, next_parts: Any) -> Any:
    backend._processor.scheduler.reset()
    return next_parts(backend)


@pytest.mark.parametrize(
    ("name", "wrong", "reported"),
    [
        ("_forward", out_of_memory, "out of memory"),
        ("_forward", other_tokens, "does not run the tokens"),
        ("_forward", other_positions, "does not run the tokens"),
        ("_forward", a_token_unseen, "3 tokens ran, and 2 passed"),
        ("_next_parts", nothing_scheduled, "nothing to run"),
    ],
)
def test_a_pass_that_is_not_what_it_should_be_fails_its_rows_and_no_later_ones(
    pair: ModelPair,
    new_guard: NewGuard,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    wrong: Callable[..., Any],
    reported: str,
) -> None:
    guard = new_guard()
    engine = engine_of(pair, guard)
    goes_wrong_once(monkeypatch, name, wrong)
    broken, fine = Heard(), Heard()
    engine.submit(generation(PROMPTS[0]), broken)
    broken.wait()
    engine.submit(generation(PROMPTS[1]), fine)
    engine.close()
    guard.close()
    assert isinstance(broken.last, Failed) and reported in caplog.text and broken.text == ""
    assert fine.end.answer_tokens > 0 and fine.end.verdict.coverage == 1


def one_left_out(backend: Continuous, next_parts: Any) -> Any:
    prepare = backend._processor.prepare_next_batch

    def prepared() -> bool:
        backend._processor.prepare_next_batch = prepare
        done = prepare()
        backend._processor.inputs_and_outputs.requests_in_batch.pop()
        return done

    backend._processor.prepare_next_batch = prepared
    return next_parts(backend)


def test_a_row_that_the_scheduler_suspends_is_noticed(
    pair: ModelPair, new_guard: NewGuard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    goes_wrong_once(monkeypatch, "_next_parts", one_left_out, live=2)
    heard = run(pair, new_guard(), [generation(prompt) for prompt in PROMPTS[:2]], backend=Continuous)
    assert all(isinstance(one.last, Failed) for one in heard) and "suspended a row" in caplog.text


def test_the_server_runs_on_it_where_it_is_told_to(serve: Callable[..., Any], parts: list[tuple[int, int]]) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "abc"}]}
    for backend in ("eager", "continuous"):
        assert not parts
        with serve(backend=backend, threshold=1e9).client() as client:  # nothing to explain: they share a model
            assert client.post("/v1/chat/completions", json=body).json()["guard"]["coverage"] == 1
    assert parts


def refused(model: Any, guard: Guard) -> str:
    with pytest.raises(UsageError) as error:
        Continuous(model, Rows(model, tiny_tokenizer(), guard, 2))
    guard.close()
    assert "--backend eager" in str(error.value)
    return str(error.value)


def test_models_that_do_not_run_this_way_are_refused_at_the_start(
    pair: ModelPair, new_guard: NewGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "sliding_attention" in refused(tiny_model("gemma3"), new_guard())
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    assert "eager attention" in refused(eager, new_guard())
    convolving = tiny_model("llama")
    convolving.config.layer_types = ["conv"] * 3
    assert "does not run" in refused(convolving, new_guard())
    with monkeypatch.context() as patch:
        patch.setattr(continuous, "ROW_TOKENS", 1 << 40)
        vast = tiny_model("llama")
        vast.config.max_position_embeddings = 1 << 40
        assert "smaller --max-batch" in refused(vast, new_guard())
    with monkeypatch.context() as patch:
        patch.setattr(
            PagedAttentionCache, "update", lambda self, key_states, value_states, **_: (key_states, value_states)
        )
        assert "does not run" in refused(tiny_model("llama"), new_guard())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers.generation.continuous_batching", None)
        assert "installed transformers" in refused(tiny_model("llama"), new_guard())


def test_a_model_that_answers_wrongly_when_packed_is_refused(
    new_guard: NewGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = PagedAttentionCache.update

    def forgets(self: Any, key_states: torch.Tensor, value_states: torch.Tensor, *more: Any, **named: Any) -> Any:
        keys, values = update(self, key_states, value_states, *more, **named)
        return keys, values.roll(1, dims=2)  # each token reads its neighbour's value

    monkeypatch.setattr(PagedAttentionCache, "update", forgets)
    assert "something else" in refused(tiny_model("llama"), new_guard())


@pytest.mark.parametrize(("architecture", "keeps"), [("qwen3", True), ("gpt2", True), ("lora", True), ("gpt2", False)])
def test_other_architectures_run_packed_as_they_run_alone(
    new_guard: NewGuard, monkeypatch: pytest.MonkeyPatch, architecture: str, keeps: bool
) -> None:
    if not keeps:  # a model that computes the logits of every token
        monkeypatch.setattr(continuous, "takes", lambda model, argument: False)
    guard = new_guard()
    model = with_lora(tiny_model("llama"), "llama") if architecture == "lora" else tiny_model(architecture)
    Continuous(model, Rows(model, tiny_tokenizer(), guard, 1))  # it compares them itself
    guard.close()


def test_an_architecture_that_the_installed_transformers_does_not_pack_is_refused(new_guard: NewGuard) -> None:
    """GPT-NeoX in 5.24 does not pass the paged cache what it asks for; in other releases it runs."""
    guard, model = new_guard(), tiny_model("gpt_neox")
    try:
        Continuous(model, Rows(model, tiny_tokenizer(), guard, 1))
    except UsageError as refusal:
        assert "--backend eager" in str(refusal) and "GPTNeoXForCausalLM" in str(refusal)
    guard.close()
