"""The rows that run in an engine, the contract of a backend, and the reference backend."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.contracts import Intervention
from molehunt.errors import NotTestable
from molehunt.model.blocks import unwrapped
from molehunt.model.cache_check import decoding_check
from molehunt.model.decoding import DecodingBatch
from molehunt.model.generate import stop_ids
from molehunt.model.sampling import Sampler, logprobs_of, next_tokens
from molehunt.serve.guard import Finished, Guard
from molehunt.serve.prompt_logprobs import prompt_logprobs
from molehunt.serve.request import AnswerPiece, Failed, GenerationRequest, Listener, Reason
from molehunt.serve.steering import CosineBounds, Steering
from molehunt.serve.text import TextStream
from molehunt.site import Site
from molehunt.watch.columns import Columns
from molehunt.watch.profile import RunningProfile
from molehunt.watch.strata import prompt_features

QUEUED_STEPS = 16
"""Number of steps that are judged together where a verdict changes nothing before the answer ends."""
PREFILL_TOKENS = 8192
"""Tokens of one prefill of the eager backend, padding included; a longer prompt is prefilled alone."""


@dataclass(eq=False, repr=False)  # what a client wrote is kept out of tracebacks
class Row:
    """One request, from when it is taken until it is settled."""

    request: GenerationRequest
    listener: Listener
    sampler: Sampler
    text: TextStream
    answer: list[int] = field(default_factory=list[int])
    seen: int = 0
    """Number of its tokens that passed the watched places, from the first on and without a gap."""
    flagged: bool = False
    steered: Mapping[Site, CosineBounds] | None = None
    cancelled: bool = False
    """Whether the client has gone. Other threads set this."""
    ended: Reason | None = None

    @classmethod
    def of(cls, request: GenerationRequest, listener: Listener, tokenizer: PreTrainedTokenizerBase) -> "Row":
        return cls(request, listener, Sampler(request.sampling, request.prompt), TextStream(tokenizer, request.stop))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and answer so far."""
        return (*self.request.prompt, *self.answer)

    def __len__(self) -> int:
        return len(self.request.prompt) + len(self.answer)


class Rows:
    """The rows that run in one engine: each token is judged, then drawn, then sent; who has ended is settled."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, guard: Guard, most: int) -> None:
        """`most` rows run at once."""
        self.guard = guard
        self.tokenizer = tokenizer
        self.most = most
        self.live: list[Row] = []
        """Rows whose prompts were judged and whose answers grow."""
        self.joining: list[Row] = []
        """Rows whose prompts are not judged yet."""
        self._model = model
        self._stops = stop_ids(model, tokenizer)
        self._device = next(model.parameters()).device
        self.steering = Steering(guard.bank, guard.state.monitor, self._device, guard.edit)
        self._monitor = guard.state.monitor.to(self._device)
        self._growing: RunningProfile | None = None

    def __len__(self) -> int:
        return len(self.live) + len(self.joining)

    def judge_prompts(self, rows: Sequence[Row], columns: Float[Tensor, "rows columns"]) -> RunningProfile:
        """Judge joining rows by the last tokens of their prompts, which decide how the answers begin."""
        prompts = prompt_features(self._model, [row.request.prompt for row in rows])
        growing = RunningProfile(prompts, columns.shape[-1], self._device)
        growing.extend(columns[:, None])
        self._refuse_uncovered(rows)
        self._flag(rows, growing)
        return growing

    def join(self, rows: Sequence[Row], growing: RunningProfile) -> None:
        """Let rows live that `judge_prompts` has judged, behind those that do."""
        if self._growing is None:
            self._growing = growing
        else:
            self._growing.join(growing)
        self.live += rows
        self.joining = [row for row in self.joining if row not in rows]

    def judge(self, columns: Float[Tensor, "live columns"]) -> None:
        """Judge the newest token of every live row, in their order."""
        self._refuse_uncovered(self.live)
        self._take_up(columns[:, None])

    def judge_step(self, columns: Columns) -> None:
        """Judge the newest token of every live row; if it only matters in the end, together with those that follow."""
        if self.guard.action in ("block", "steer"):
            self.judge(columns.take()[:, -1])
            return
        columns.queue()
        self._refuse_uncovered(self.live)
        if columns.queued == QUEUED_STEPS:
            self.catch_up(columns)

    def catch_up(self, columns: Columns) -> None:
        """Judge the steps that wait. To be called before rows join or leave."""
        if columns.queued:
            self._take_up(columns.take_queued())

    def _take_up(self, columns: Float[Tensor, "live steps columns"]) -> None:
        if self._growing is not None:
            self._growing.extend(columns)
            self._flag(self.live, self._growing)

    @staticmethod
    def _refuse_uncovered(rows: Sequence[Row]) -> None:
        for row in rows:
            if row.seen < len(row):
                row.ended = "content_filter"  # not scored, so not answered

    def _flag(self, rows: Sequence[Row], growing: RunningProfile) -> None:
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
                    row.steered = self.steering.against(judged)

    def emit(self, rows: Sequence[Row], logits: Float[Tensor, "rows vocab"]) -> None:
        """Draw each row's next token and send the text that is certain. Their newest tokens were judged, or are queued."""
        tokens = next_tokens(logits, [row.sampler for row in rows])
        broken: list[bool] = logits[:, 0].isnan().tolist()  # the last norm spreads a NaN over all of them
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if broken[i]:
                row.ended = row.ended or "content_filter"
            if row.cancelled:
                row.ended = row.ended or "cancelled"
            if row.request.max_new_tokens == 0:
                row.ended = row.ended or "length"
            if row.ended is not None:
                continue
            row.answer.append(token)
            text = row.text.finish() if token in self._stops else row.text.push(token)
            if token in self._stops or row.text.stopped:
                row.ended = "stop"
            elif len(row.answer) >= row.request.max_new_tokens:
                row.ended = "length"
                text += row.text.finish()
            top = row.request.logprobs
            logprobs = () if top is None else (logprobs_of(logits[i], token, top),)
            if text or logprobs:
                row.listener(AnswerPiece(text, logprobs))

    def report_prompt(self, row: Row, columns: Columns, steered: Sequence[Mapping[Site, CosineBounds] | None]) -> None:
        """Send the log probabilities of a joined row's prompt, if it asks for them and its prompt may be answered.

        Args:
            steered: what acts on the pass that computes them, as the interventions of the backend read it.
        """
        request = row.request
        if not request.prompt_logprobs or request.logprobs is None or row.ended or row.cancelled:
            return
        last = torch.tensor([[len(request.prompt) - 1]])
        with self.steering.of(steered), columns.only(last):
            found = prompt_logprobs(self._model, request.prompt, request.logprobs, between=columns.take)
        if found is None:
            row.ended = "content_filter"  # not finite, so not answered
        else:
            row.listener(AnswerPiece("", prompt_logprobs=found))

    def leave(self) -> Int[Tensor, " kept"] | None:
        """Hand over the rows that have ended. Places of the live rows that go on, or None where all do."""
        growing = self._growing
        if growing is None or not any(row.ended for row in self.live):
            return None
        for i, row in enumerate(self.live):
            if row.ended is None:
                continue
            try:
                profile = growing.profile(i)
            except ValueError:  # NaN
                profile = None
            self.guard.settle(
                Finished(
                    request=row.request.id,
                    listener=row.listener,
                    reason=row.ended,
                    prompt=row.request.prompt,
                    answer=tuple(row.answer),
                    profile=profile,
                    seen=row.seen,
                )
            )
        kept = [i for i, row in enumerate(self.live) if row.ended is None]
        self.live = [self.live[i] for i in kept]
        going = torch.tensor(kept, dtype=torch.long, device=self._device)
        if kept:
            growing.keep(going)
        else:
            self._growing = None
        return going

    def fail(self) -> None:
        """Send every client a failure, and start again without rows."""
        for row in (*self.live, *self.joining):
            row.listener(Failed("the model failed on this request"))
        self.live, self.joining, self._growing = [], [], None


class Backend(Protocol):
    """Runs forward passes for the rows of one engine, on the engine's thread.

    Whatever an exception leaves behind is undone by `Rows.fail` and `reset`: the clients of all rows get a failure.
    """

    @property
    def interventions(self) -> Sequence[Intervention]:
        """The interventions on steered rows, which act on every forward pass of the engine."""
        ...

    @property
    def longest(self) -> int | None:
        """Tokens of prompt and answer together that a request may have; None sets no limit."""
        ...

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether the last of `rows` may begin together with the others, beside the rows that run.

        A row of at most `longest` tokens fits once nothing else runs.
        """
        ...

    def begin(self, rows: Sequence[Row], columns: Columns) -> None:
        """Take up rows that are joining. Their prompts may run now or in the steps that follow."""
        ...

    def step(self, columns: Columns) -> None:
        """One forward pass for the rows that run: what it computed is judged before a token is drawn from it."""
        ...

    def reset(self) -> None:
        """Forget every row."""
        ...


class Eager:
    """The reference: rows padded to one length, on a dense key-value cache that grows and shrinks with them.

    New rows are prefilled together and join the others between two steps, where the model's cache lets them.
    """

    longest = None

    def __init__(self, model: nn.Module, rows: Rows) -> None:
        """Raises NotTestable for a model whose cache is not to be trusted: every token would cost a whole pass."""
        check = decoding_check(model)
        if not check.cached:
            raise NotTestable(
                f"{type(unwrapped(model)).__name__} cannot be served: it would have to decode without a cache, because "
                f"{check.why}.\n`molehunt watch` judges a log of its answers instead."
            )
        self._model = model
        self._rows = rows
        self._device = next(model.parameters()).device
        self._batch = DecodingBatch(model)
        self.interventions: Sequence[Intervention] = rows.steering.interventions

    def fits(self, rows: Sequence[Row]) -> bool:
        if self._rows.live and not self._batch.can_join:
            return False
        return len(rows) == 1 or max(len(row.request.prompt) for row in rows) * len(rows) <= PREFILL_TOKENS

    def begin(self, rows: Sequence[Row], columns: Columns) -> None:
        """Prefill. Where a flagged prompt is to be steered, all of them are prefilled again with it steered."""
        prompts = [row.request.prompt for row in rows]
        decisions = last_tokens(prompts)  # they decide how the answers begin
        fresh = DecodingBatch(self._model)
        with columns.only(decisions):
            logits = fresh.begin(prompts)
        for row in rows:
            row.seen = min(len(row.request.prompt), columns.passed)
        growing = self._rows.judge_prompts(rows, columns.take()[:, 0])
        if any(row.steered for row in rows):
            fresh = DecodingBatch(self._model)
            with self._rows.steering.of([row.steered for row in rows]), columns.only(decisions):
                logits = fresh.begin(prompts)
            columns.take()  # the verdict is about what the model was going to do
        self._rows.catch_up(columns)
        self._rows.join(rows, growing)
        self._batch.join(fresh)
        for row in rows:
            self._rows.report_prompt(row, columns, [row.steered])
        self._emit(rows, logits, columns)

    def step(self, columns: Columns) -> None:
        rows = self._rows.live
        newest = torch.tensor([row.answer[-1] for row in rows], device=self._device)
        with self._rows.steering.of([row.steered for row in rows]):
            logits = self._batch.step(newest)
        for row in rows:
            row.seen += 1
        self._rows.judge_step(columns)  # raises where a watched place was not reached
        self._emit(rows, logits, columns)

    def _emit(self, rows: Sequence[Row], logits: Float[Tensor, "rows vocab"], columns: Columns) -> None:
        self._rows.emit(rows, logits)
        if any(row.ended for row in self._rows.live):
            self._rows.catch_up(columns)
        kept = self._rows.leave()
        if kept is not None:
            self._batch.keep(kept)

    def reset(self) -> None:
        self._batch = DecodingBatch(self._model)


def last_tokens(prompts: Sequence[Sequence[int]]) -> Int[Tensor, "batch 1"]:
    """Index of the last token of each prompt, counted through a batch that is padded on the left."""
    return torch.arange(1, len(prompts) + 1)[:, None] * max(map(len, prompts)) - 1
