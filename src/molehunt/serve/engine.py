"""Guarded decoding for many clients on one thread: every token is scored, where it can change the answer before its text
leaves, else before its client hears of the end.

How the model is run is the backend's business (`serve.backend`); who waits, who runs next, and what is done while nobody
waits is decided here.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from molehunt.errors import MolehuntError
from molehunt.model.taps import edit_sites
from molehunt.serve.backend import Backend, Eager, Row, Rows
from molehunt.serve.guard import Guard
from molehunt.serve.request import Failed, GenerationRequest, Listener, Overloaded
from molehunt.serve.wire import Refused
from molehunt.watch.columns import Columns, watched
from molehunt.watch.quarantine import explained

MAX_JOBS = 16
"""Greatest number of questions from the live page that wait."""
EXPLAIN_TOKENS = 64
"""Length of the answer that is generated without a flagged direction."""

log = logging.getLogger(__name__)
T = TypeVar("T")


class Engine:
    """Runs a model for many requests at once, with a guard that sees every token or none.

    Args:
        backend: how the model is run.
        max_batch: rows that run together.
        max_waiting: requests that may wait for a place; more are refused.

    Raises:
        UsageError: the backend cannot run this model.
        NotTestable: the eager backend cannot trust this model's cache.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        guard: Guard,
        *,
        backend: Callable[[nn.Module, Rows], Backend] = Eager,
        max_batch: int = 16,
        max_waiting: int = 256,
        layers_path: str | None = None,
    ) -> None:
        self.guard = guard
        self._model = model
        self._tokenizer = tokenizer
        self._layers_path = layers_path
        self._max_waiting = max_waiting
        self._waiting: deque[Row] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._taken: WeakValueDictionary[str, Row] = WeakValueDictionary()
        self._changed = threading.Condition()
        self._closing = False
        self._rows = Rows(model, tokenizer, guard, max_batch)
        self._backend = backend(model, self._rows)
        self._thread = threading.Thread(target=self._run, name="molehunt-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are still served; a model that cannot be watched ends the engine."""
        return self._thread.is_alive() and not self._closing

    def load(self) -> tuple[int, int]:
        """How many rows run now, and how many requests wait."""
        return len(self._rows), len(self._waiting)

    def submit(self, generation: GenerationRequest, listener: Listener) -> None:
        """Queue a request; `listener` is called with its pieces and its end.

        Raises:
            Overloaded: too many wait, or the engine is closing.
            Refused: the request is longer than any that the backend can run.
        """
        length, longest = len(generation.prompt) + generation.max_new_tokens, self._backend.longest
        if longest is not None and length > longest:
            raise Refused(
                400,
                f"{length} tokens, prompt and answer together, are more than the {longest} that the cache of this "
                "server holds",
                code="context_length_exceeded",
            )
        row = Row.of(generation, listener, self._tokenizer)
        with self._changed:
            if not self.alive:
                raise Overloaded("the server is shutting down")
            if len(self._waiting) >= self._max_waiting:
                raise Overloaded(f"{self._max_waiting} requests wait already")
            self._waiting.append(row)
            self._taken[generation.id] = row
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
            if len(self._jobs) >= MAX_JOBS:
                raise Overloaded(f"{MAX_JOBS} questions wait already")
            self._jobs.append((job, promised))
            self._changed.notify()
        return promised

    def cancel(self, id: str) -> None:
        """Stop a request whose client has gone; what was generated is still judged. Unknown ids do nothing."""
        with self._changed:
            row = self._taken.get(id)
            if row is not None:
                row.cancelled = True

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
                stack.enter_context(edit_sites(self._model, self._backend.interventions, layers_path=self._layers_path))
                while self._next():
                    try:
                        self._admit(columns)
                        self._do_one_job()
                        if len(self._rows):
                            self._backend.step(columns)
                        elif self.guard.to_explain and not self._closing:
                            self._explain()
                    except Exception:  # one bad batch must not take the server down; its clients get a failure
                        log.exception("a batch failed")
                        self._rows.fail()
                        self._backend.reset()
                        columns.forget()
        finally:
            self._closing = True
            self._rows.fail()
            with self._changed:
                for row in self._waiting:
                    row.listener(Failed("the server is shutting down"))
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
            while not (self._waiting or len(self._rows) or self._jobs):
                if self._closing:
                    return False
                if self.guard.to_explain:
                    return True
                self._changed.wait(0.2)  # the guard adds alerts to explain without a word
            return True

    def _admit(self, columns: Columns) -> None:
        """Start the requests that wait and fit."""
        rows = self._next_taken()
        if rows:
            self._rows.joining += rows
            self._backend.begin(rows, columns)

    def _next_taken(self) -> list[Row]:
        """The next requests for which there is room; those whose client has gone are dropped."""
        with self._changed:
            taken: list[Row] = []
            while self._waiting and len(self._rows) + len(taken) < self._rows.most:
                row = self._waiting[0]
                if not row.cancelled:
                    if not self._backend.fits([*taken, row]):
                        break
                    taken.append(row)
                self._waiting.popleft()
            return taken

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
