"""What an engine does whatever runs its model: jobs, explanations that fail, models that cannot be watched."""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest

from guarded import PROMPTS, Heard, generation, guard_of, run
from molehunt.errors import CannotTap
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.serve import engine as engines
from molehunt.serve.backend import Backend, Eager
from molehunt.serve.continuous import Continuous
from molehunt.serve.engine import MAX_JOBS, Engine
from molehunt.serve.request import Failed, Overloaded
from molehunt.watch.bank import Bank
from molehunt.watch.ledger import Ledger
from molehunt.watch.state import WatchState
from tiny_models import tiny_model, tiny_tokenizer
from watched_banks import bank_of

every_backend = pytest.mark.parametrize("backend", [Eager, Continuous])
Make = Callable[..., Backend]


def cannot(*_: Any, **__: Any) -> None:
    raise CannotTap("hooks see nothing here")


@every_backend
def test_jobs_are_answered_or_fail_by_themselves_and_only_so_many_wait(
    pair: ModelPair, bank: Bank, calibrated_state: WatchState, ledger: Ledger, backend: Make
) -> None:
    guard = guard_of(pair, bank, calibrated_state, ledger)
    engine = Engine(pair._tuned, pair.tokenizer, guard, backend=backend)
    began, go_on = threading.Event(), threading.Event()
    first = engine.between(lambda: (began.set(), go_on.wait(60))[1])
    assert began.wait(60)
    waiting = [engine.between(lambda i=i: 1 // i) for i in range(MAX_JOBS)]
    with pytest.raises(Overloaded, match="questions wait"):
        engine.between(lambda: 0)
    go_on.set()
    assert first.result(60)
    with pytest.raises(ZeroDivisionError):
        waiting[0].result(60)
    assert waiting[1].result(60) == 1
    heard = Heard()
    engine.submit(generation(PROMPTS[0]), heard)
    engine.close()
    guard.close()
    assert heard.end.verdict.coverage == 1
    with pytest.raises(Overloaded, match="shutting down"):
        engine.between(lambda: 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@every_backend
def test_a_model_that_cannot_be_watched_ends_the_engine_and_everybody_is_told(
    pair: ModelPair,
    bank: Bank,
    calibrated_state: WatchState,
    ledger: Ledger,
    backend: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submitted = threading.Event()

    @contextmanager
    def watched(*_: Any, **__: Any) -> Generator[None, None, None]:
        assert submitted.wait(60)
        cannot()
        yield

    monkeypatch.setattr(engines, "watched", watched)
    guard = guard_of(pair, bank, calibrated_state, ledger)
    engine = Engine(pair._tuned, pair.tokenizer, guard, backend=backend)
    heard = Heard()
    engine.submit(generation(PROMPTS[0]), heard)
    promised = engine.between(lambda: 0)
    submitted.set()
    heard.wait()
    with pytest.raises(Overloaded, match="shutting down"):
        promised.result(60)
    engine.close()
    guard.close()
    assert isinstance(heard.last, Failed) and not engine.alive


def test_an_alert_that_cannot_be_explained_keeps_nobody_waiting(
    pair: ModelPair,
    bank: Bank,
    calibrated_state: WatchState,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(engines, "explained", cannot)
    guard = guard_of(pair, bank, calibrated_state, ledger, threshold=-1e9)
    engine = Engine(pair._tuned, pair.tokenizer, guard)
    for prompt in PROMPTS[:2]:
        heard = Heard()
        engine.submit(generation(prompt), heard)
        heard.wait()
        for _ in range(200):
            if not guard.to_explain:
                break
            heard.sleep()
    engine.close()
    guard.close()
    assert heard.end.verdict.flagged and caplog.text.count("could not be explained") == 2


def test_rows_whose_cache_cannot_be_joined_run_from_their_beginning_to_their_end(
    calibrated_state: WatchState, ledger: Ledger
) -> None:
    model = tiny_model("gemma3", 1)  # sliding windows
    pair = ModelPair(tiny_model("gemma3", 0), model, tiny_tokenizer())
    heard = run(
        pair,
        guard_of(pair, bank_of("gemma3"), calibrated_state, ledger),
        [generation(prompt, n) for n, prompt in enumerate(PROMPTS, 3)],
        max_batch=2,
    )
    for n, (one, prompt) in enumerate(zip(heard, PROMPTS, strict=True), 3):
        (answer,) = generate(model, pair.tokenizer, [prompt], max_new_tokens=n)
        assert one.text == pair.tokenizer.decode(answer, skip_special_tokens=True) and one.end.verdict.coverage == 1
