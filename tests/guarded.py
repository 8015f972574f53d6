"""A tiny guarded model, and somebody who listens to it."""

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np

from molehunt.model.pair import ModelPair
from molehunt.model.sampling import TokenLogprobs
from molehunt.serve.engine import Engine
from molehunt.serve.guard import Guard
from molehunt.serve.request import AnswerPiece, Ended, Failed, GenerationRequest
from molehunt.traffic.stream import Conversation, Place
from molehunt.traffic.turn import Turn
from molehunt.watch.bank import Bank
from molehunt.watch.ledger import Ledger
from molehunt.watch.sketch import ScoreSketch
from molehunt.watch.state import WatchState
from tiny_models import tiny_model, tiny_tokenizer

FPR = 0.05
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2], [11], [30, 31, 32, 33, 34, 35], [12, 40, 3]]


def tiny_pair() -> ModelPair:
    return ModelPair(tiny_model("llama", 0), tiny_model("llama", 1), tiny_tokenizer())


def clean_rows(n: int, seed: int = 0) -> list[Conversation]:
    rng = np.random.default_rng(seed)
    return [
        Conversation(
            turns=(Turn("user", "".join(rng.choice(list("abcdefgh "), 6))),),
            response=None,
            tag="clean",
            line=i,
            end=Place(i, i),
        )
        for i in range(1, n + 1)
    ]


def guard_of(
    pair: ModelPair,
    bank: Bank,
    calibrated_state: WatchState,
    ledger: Ledger,
    *,
    action: str = "flag",
    edit: str = "project",
    threshold: float | None = None,
) -> Guard:
    """A guard on a copy of a calibrated state."""
    state = replace(
        calibrated_state, scores=ScoreSketch.empty(1), drift=replace(calibrated_state.drift), seen=0, flagged=0
    )
    guard = Guard(bank, state, ledger, pair.tokenizer, fpr=FPR, action=action, edit=edit)  # pyright: ignore
    if threshold is not None:
        guard.threshold = threshold
    return guard


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.text = ""
        self.logprobs: list[TokenLogprobs] = []
        self.last: Ended | Failed | None = None
        self._changed = threading.Condition()

    def __call__(self, reported: AnswerPiece | Ended | Failed) -> None:
        with self._changed:
            if isinstance(reported, AnswerPiece):
                assert self.last is None, "a piece after the end"
                self.text += reported.text
                self.logprobs += reported.logprobs
            else:
                assert self.last is None, "two ends"
                self.last = reported
            self._changed.notify_all()

    @property
    def end(self) -> Ended:
        assert isinstance(self.last, Ended), self.last
        return self.last

    def wait(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.last is not None, 60)

    def wait_for_text(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.text, 60)

    @staticmethod
    def sleep() -> None:
        time.sleep(0.05)


def generation(prompt: list[int], n: int = 8, **more: object) -> GenerationRequest:
    return GenerationRequest(**{"id": f"r{prompt}{n}", "prompt": tuple(prompt), "max_new_tokens": n, **more})  # pyright: ignore


def run(pair: ModelPair, guard: Guard, requests: list[GenerationRequest], **settings: Any) -> list[Heard]:
    """What each client hears from an engine that is closed once it has taken all of them."""
    engine = Engine(pair._tuned, pair.tokenizer, guard, **settings)
    heard = [Heard() for _ in requests]
    for request, one in zip(requests, heard, strict=True):
        engine.submit(request, one)
    engine.close()
    guard.close()
    return heard
