"""Guarded decoding for many clients on one thread: every token is scored before its text leaves.

The reference backend: Hugging Face modules run eagerly, on CPU or GPU. New requests join the running batch between two
steps where the model's cache lets them.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.errors import MolehuntError
from molehunt.model.generate import stop_ids
from molehunt.model.site import Site
from molehunt.model.taps import edit_sites
from molehunt.serve.decoding import DecodingBatch
from molehunt.serve.guard import Finished, Guard
from molehunt.serve.request import Asked, Failed, Listener, Overloaded, Piece, Reason
from molehunt.serve.sampling import Sampler, logprobs_of, next_tokens
from molehunt.serve.steering import Held, Steering
from molehunt.serve.text import TextStream
from molehunt.watch.columns import Columns, watched
from molehunt.watch.kinds import prompt_features
from molehunt.watch.profile import RunningProfile
from molehunt.watch.quarantine import explained

PREFILL_TOKENS = 8192
"""Tokens of one prefill, padding included; a longer prompt is prefilled alone."""
MOST_JOBS = 16
"""Questions from the live page that may wait."""
EXPLAIN_TOKENS = 64
"""Length of the answer that is generated without a flagged direction."""

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(eq=False)
class _Row:
    asked: Asked
    listener: Listener
    sampler: Sampler
    text: TextStream
    answer: list[int] = field(default_factory=list[int])
    seen: int = 0
    flagged: bool = False
    steered: Mapping[Site, Held] | None = None
    ended: Reason | None = None


class Engine:
    """Runs a model for many requests at once, with a guard that sees every token or none.

    Args:
        max_batch: rows that decode together.
        max_waiting: requests that may wait for a place; more are refused.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        guard: Guard,
        *,
        max_batch: int = 16,
        max_waiting: int = 256,
        layers_path: str | None = None,
    ) -> None:
        self.guard = guard
        self._model = model
        self._tokenizer = tokenizer
        self._layers_path = layers_path
        self._stops = stop_ids(model, tokenizer)
        self._device = next(model.parameters()).device
        self._monitor = guard.state.monitor.to(self._device)
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[Asked, Listener]] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._taken: set[str] = set()
        self._cancelled: set[str] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._rows: list[_Row] = []
        self._joining: list[_Row] = []
        """Rows whose prefill has begun and that have not joined yet."""
        self._batch = DecodingBatch(model)
        self._growing: RunningProfile | None = None
        self._steering = Steering(guard.bank, guard.state.monitor, self._device, guard.edit)
        self._thread = threading.Thread(target=self._run, name="molehunt-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are still served; a model that cannot be watched ends the engine."""
        return self._thread.is_alive() and not self._closing

    def load(self) -> tuple[int, int]:
        """How many rows decode now, and how many requests wait."""
        return len(self._rows), len(self._waiting)

    def submit(self, asked: Asked, listener: Listener) -> None:
        """Queue a request; `listener` hears of its pieces and its end.

        Raises:
            Overloaded: too many wait, or the engine is closing.
        """
        with self._changed:
            if not self.alive:
                raise Overloaded("the server is shutting down")
            if len(self._waiting) >= self._max_waiting:
                raise Overloaded(f"{self._max_waiting} requests wait already")
            self._waiting.append((asked, listener))
            self._taken.add(asked.id)
            self._changed.notify()

    def between(self, job: Callable[[], T]) -> "Future[T]":
        """Run `job` on the engine's thread between two steps: whoever else runs the model would be scored as its rows.

        Raises:
            Overloaded: as `submit`.
        """
        promised: Future[T] = Future()
        with self._changed:
            if not self.alive:
                raise Overloaded("the server is shutting down")
            if len(self._jobs) >= MOST_JOBS:
                raise Overloaded(f"{MOST_JOBS} questions wait already")
            self._jobs.append((job, promised))
            self._changed.notify()
        return promised

    def cancel(self, id: str) -> None:
        """Stop a request whose client has gone; what was generated is still judged. Unknown ids do nothing."""
        with self._changed:
            if id in self._taken:
                self._cancelled.add(id)

    def close(self) -> None:
        """Take no more requests, finish those that were taken, and return."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            with ExitStack() as stack:
                columns = stack.enter_context(watched(self._model, self.guard.bank, layers_path=self._layers_path))
                stack.enter_context(
                    edit_sites(self._model, self._steering.interventions, layers_path=self._layers_path)
                )
                while self._next():
                    try:
                        self._admit(columns)
                        self._do_one_job()
                        if self._rows:
                            self._step(columns)
                        elif self.guard.to_explain and not self._closing:
                            self._explain()
                    except Exception:  # one bad batch must not take the server down; its clients are told
                        log.exception("a batch failed")
                        self._fail_all()
        finally:
            self._closing = True
            self._fail_all()
            with self._changed:
                for _, listener in self._waiting:
                    listener(Failed("the server is shutting down"))
                self._waiting.clear()
                for _, promised in self._jobs:
                    promised.set_exception(Overloaded("the server is shutting down"))
                self._jobs.clear()

    def _do_one_job(self) -> None:
        with self._changed:
            if not self._jobs:
                return
            job, promised = self._jobs.popleft()
        try:
            promised.set_result(job())
        except Exception as error:  # raised where the answer is waited for
            promised.set_exception(error)

    def _next(self) -> bool:
        """Wait for something to do. False: closing, and nothing is left."""
        with self._changed:
            while not (self._waiting or self._rows or self._jobs):
                if self._closing:
                    return False
                if self.guard.to_explain:
                    return True
                self._changed.wait(0.2)  # the guard adds alerts to explain without a word
            return True

    def _admit(self, columns: Columns) -> None:
        """Prefill what waits and fits, judge its first token, and let it join."""
        taken = self._next_taken()
        if not taken:
            return
        rows = [
            _Row(asked, listener, Sampler(asked.sampling), TextStream(self._tokenizer, asked.stop))
            for asked, listener in taken
        ]
        self._joining = rows
        self._begin(rows, columns)

    def _next_taken(self) -> list[tuple[Asked, Listener]]:
        """The next requests that fit into one prefill and into the batch; those whose client has gone are dropped."""
        with self._changed:
            free = self._max_batch - len(self._rows) if not self._rows or self._batch.can_join else 0
            taken: list[tuple[Asked, Listener]] = []
            width = 0
            while self._waiting and len(taken) < free:
                asked, listener = self._waiting[0]
                width = max(width, len(asked.prompt))
                if taken and width * (len(taken) + 1) > PREFILL_TOKENS:
                    break
                self._waiting.popleft()
                if asked.id in self._cancelled:
                    self._forget(asked.id)
                    continue
                taken.append((asked, listener))
            return taken

    def _begin(self, rows: list[_Row], columns: Columns) -> None:
        """Judge each row at its decision. Where a flagged one is to be steered, all are prefilled again with it steered."""
        prompts = [row.asked.prompt for row in rows]
        fresh = DecodingBatch(self._model)
        logits = fresh.begin(prompts)
        found = columns.take()
        growing = RunningProfile(prompt_features(self._model, prompts), found.shape[-1], self._device)
        growing.extend(found[:, -1:])  # padded on the left: the last column is every row's decision
        for row in rows:
            row.seen = min(len(row.asked.prompt), found.shape[1])
        self._flag(rows, growing)
        if any(row.steered for row in rows):
            fresh = DecodingBatch(self._model)
            with self._steering.of([row.steered for row in rows]):
                logits = fresh.begin(prompts)
            columns.take()  # the verdict is about what the model was going to do
        if self._growing is None:
            self._growing = growing
        else:
            self._growing.join(growing)
        self._batch.join(fresh)
        self._rows += rows
        self._joining = []
        self._emit(rows, logits)
        self._leave()

    def _step(self, columns: Columns) -> None:
        """One token for every row."""
        growing = self._growing
        assert growing is not None
        newest = torch.tensor([row.answer[-1] for row in self._rows], device=self._device)
        with self._steering.of([row.steered for row in self._rows]):
            logits = self._batch.step(newest)
        found = columns.take()
        growing.extend(found)
        for row in self._rows:
            row.seen += found.shape[1]
        self._flag(self._rows, growing)
        self._emit(self._rows, logits)
        self._leave()

    def _flag(self, rows: Sequence[_Row], growing: RunningProfile) -> None:
        surprises: list[float] = self._monitor.running(growing).tolist()
        for i, (row, surprise) in enumerate(zip(rows, surprises, strict=True)):
            if math.isnan(surprise):
                row.ended = "content_filter"  # not scored, so not answered
            elif not row.flagged and self.guard.beyond(surprise):
                row.flagged = True
                if self.guard.action == "block":
                    row.ended = "content_filter"
                elif self.guard.action == "steer":
                    judged = self.guard.state.monitor.judge(growing.profile(i))
                    row.steered = self._steering.against(judged)

    def _emit(self, rows: Sequence[_Row], logits: Float[Tensor, "batch vocab"]) -> None:
        """Draw each row's next token and send the text that is certain."""
        tokens = next_tokens(logits, [row.sampler for row in rows])
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if row.asked.id in self._cancelled:
                row.ended = row.ended or "cancelled"
            if row.ended is not None:
                continue
            row.answer.append(token)
            text = row.text.finish() if token in self._stops else row.text.push(token)
            if token in self._stops or row.text.stopped:
                row.ended = "stop"
            elif len(row.answer) >= row.asked.max_new_tokens:
                row.ended = "length"
                text += row.text.finish()
            top = row.asked.logprobs
            told = () if top is None else (logprobs_of(logits[i], token, top),)
            if text or told:
                row.listener(Piece(text, told))

    def _leave(self) -> None:
        """Hand over the rows that have ended; the others go on without them."""
        growing = self._growing
        if growing is None or not any(row.ended for row in self._rows):
            return
        for i, row in enumerate(self._rows):
            if row.ended is None:
                continue
            try:
                profile = growing.profile(i)
            except ValueError:  # NaN
                profile = None
            asked = row.asked
            self._forget(asked.id)
            self.guard.settle(
                Finished(
                    request=asked.id,
                    listener=row.listener,
                    reason=row.ended,
                    prompt=asked.prompt,
                    answer=tuple(row.answer),
                    profile=profile,
                    seen=row.seen,
                )
            )
        left = torch.tensor([i for i, row in enumerate(self._rows) if row.ended is None], dtype=torch.long)
        self._rows = [row for row in self._rows if row.ended is None]
        if not self._rows:
            self._reset()
            return
        self._batch.keep(left.to(self._device))
        growing.keep(left.to(self._device))

    def _forget(self, id: str) -> None:
        self._taken.discard(id)
        self._cancelled.discard(id)

    def _reset(self) -> None:
        self._rows, self._growing, self._batch = [], None, DecodingBatch(self._model)

    def _fail_all(self) -> None:
        for row in (*self._rows, *self._joining):
            self._forget(row.asked.id)
            row.listener(Failed("the model failed on this request"))
        self._joining = []
        self._reset()

    def _explain(self) -> None:
        """While nobody waits: the oldest unexplained alert gets its token scores and its answer without the direction."""
        settled = self.guard.to_explain.popleft()
        if settled.alert is None or settled.answered is None:
            return
        try:
            whole = explained(
                settled.alert,
                self._model,
                self._tokenizer,
                self.guard.bank,
                self.guard.state.monitor,
                settled.answered,
                max_new_tokens=EXPLAIN_TOKENS,
                layers_path=self._layers_path,
            )
            self.guard.ledger.amend(whole)
            if self.guard.on_explained is not None:
                self.guard.on_explained(whole)
        except MolehuntError as error:
            log.warning("%s could not be explained: %s", settled.alert.id, error)
