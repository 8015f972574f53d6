"""The backend on transformers' continuous batching: prompts in chunks, answers, all packed into one row without padding.

Its batch processor schedules and keeps the paged cache; forward passes, judging and drawing happen here, on the engine's
thread. So CUDA graphs, which replay without calling a hook, are never captured, and no token is drawn by anybody before
it was judged. Block sharing is off: of a prompt that is replayed, the model would run the last tokens alone. Each pass is
checked to run the very tokens, at the very positions, that its rows are believed to have there.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from molehunt.contracts import Intervention
from molehunt.errors import UsageError, printable
from molehunt.model.blocks import unwrapped
from molehunt.model.cache import takes
from molehunt.serve.backend import Row, Rows
from molehunt.serve.request import GenerationRequest
from molehunt.serve.steering import RowClamp
from molehunt.watch.columns import Columns
from molehunt.watch.profile import RunningProfile

PASS_TOKENS = 512
"""Greatest number of tokens of one forward pass; longer prompts run in chunks."""
PAGE_TOKENS = 64
"""Number of tokens of one page of the cache."""
ROW_TOKENS = 4096
"""Number of tokens that the cache has for each row; a single request may use all of it."""


@dataclass(frozen=True, eq=False, slots=True)
class _Part:
    """The tokens of one row in a packed forward pass."""

    row: Row
    start: int
    """Position of its first token here, in its own request."""
    length: int
    last: int
    """Place of its last token in the packed row."""
    draws: bool
    """Whether a token is drawn from it: its prompt is complete."""


class _Packed:
    """An intervention on rows, for tokens of many requests in one row: each token is treated as a row of its own."""

    def __init__(self, by_row: RowClamp) -> None:
        self.site = by_row.site
        self._by_row = by_row

    def __call__(self, acts: Float[Tensor, "1 tokens d_model"]) -> Float[Tensor, "1 tokens d_model"]:
        if self._by_row.bounds is None:
            return acts
        return self._by_row(acts.transpose(0, 1)).transpose(0, 1)


class Continuous:
    """A backend (see `serve.backend`).

    Args:
        model: every block with full attention, by sdpa or a flash kernel.
        rows: those of the engine.
        pass_tokens: tokens of one forward pass.

    Raises:
        UsageError: the model does not run this way, or not to the same logits.
    """

    def __init__(self, model: nn.Module, rows: Rows, *, pass_tokens: int = PASS_TOKENS) -> None:
        self._model: Any = unwrapped(model)
        self._rows = rows
        self.interventions: Sequence[Intervention] = [_Packed(one) for one in rows.steering.interventions]
        self._keeps_logits = takes(model, "logits_to_keep")
        self._running: dict[str, Row] = {}
        self._judged: dict[Row, RunningProfile] = {}
        """Rows that were judged at their prompts and run them again, steered."""
        with _refused_plainly(self._model):
            self._processor: Any = _processor(self._model, rows.most, max(pass_tokens, rows.most))
            self._compare()
        self._pages = int(self._processor.cache.num_blocks)
        self.longest: int | None = self._pages * PAGE_TOKENS

    def fits(self, rows: Sequence[Row]) -> bool:
        """Room is kept for whole answers, so that no running row is ever suspended."""
        all_rows = (*self._rows.live, *self._rows.joining, *rows)
        return sum(map(_pages, all_rows)) <= self._pages

    def begin(self, rows: Sequence[Row], columns: Columns) -> None:
        self._add(rows)

    def step(self, columns: Columns) -> None:
        parts = self._next_parts()
        drawing = [part for part in parts if part.draws]
        steered = [part.row.steered for part in parts for _ in range(part.length)]
        decisions = torch.tensor([[part.last for part in drawing]], dtype=torch.long)
        with self._rows.steering.of(steered), columns.only(decisions):
            logits = self._forward(parts)
        found = columns.take()[0]
        if columns.passed != parts[-1].last + 1:
            raise RuntimeError(f"{parts[-1].last + 1} tokens ran, and {columns.passed} passed the watched places")
        for part in parts:
            if part.start <= part.row.seen:  # else tokens before it never passed, and the row is not covered
                part.row.seen = max(part.row.seen, part.start + part.length)
        place = {part.row: i for i, part in enumerate(drawing)}
        self._rows.judge(found[[place[row] for row in self._rows.live]])
        again: list[Row] = []
        for row in [part.row for part in drawing if part.row in self._rows.joining]:
            growing = self._judged.pop(row, None)
            if growing is None:
                growing = self._rows.judge_prompts([row], found[place[row]][None])
                if row.steered:
                    self._judged[row] = growing
                    again.append(row)
                    continue
            self._rows.join([row], growing)
            self._rows.report_prompt(row, columns, [row.steered] * len(row.request.prompt))
        self._rows.emit(self._rows.live, logits[[place[row] for row in self._rows.live]])
        self._hand_back(drawing)
        self._drop([*again, *(row for row in self._rows.live if row.ended)])
        self._rows.leave()
        self._add(again)

    def reset(self) -> None:
        self._processor.reset()
        self._running.clear()
        self._judged.clear()

    def _add(self, rows: Sequence[Row]) -> None:
        from transformers.generation.continuous_batching import RequestState

        for row in rows:
            self._running[_key(row)] = row
            state = RequestState(request_id=_key(row), initial_tokens=list(row.request.prompt), max_new_tokens=None)
            self._processor.scheduler.add_waiting_request(state)

    def _drop(self, rows: Sequence[Row]) -> None:
        for row in rows:
            del self._running[_key(row)]
            self._processor.scheduler.set_request_cancellation(_key(row))
        self._processor.scheduler.clear_cancelled_requests()

    def _next_parts(self) -> list[_Part]:
        """The parts of the next forward pass."""
        if not self._processor.prepare_next_batch():
            raise RuntimeError("the scheduler of transformers has nothing to run, and rows wait")
        parts: list[_Part] = []
        end = 0
        for one in self._processor.inputs_and_outputs.requests_in_batch:
            end += one.query_length
            start = one.state.position_offset - one.query_length  # it was moved on when the batch was prepared
            parts.append(
                _Part(self._running[one.state.request_id], start, one.query_length, end - 1, one.has_new_token)
            )
        if not set(self._rows.live) <= {part.row for part in parts if part.draws}:
            raise RuntimeError("the scheduler of transformers has suspended a row")
        return parts

    def _forward(self, parts: Sequence[_Part]) -> Float[Tensor, "drawing vocab"]:
        """The logits that tokens are drawn from, in the order of the parts that draw."""
        given = self._processor.inputs_and_outputs.get_model_kwargs()
        spans = [(part.row, range(part.start, part.start + part.length)) for part in parts]
        tokens = [token for row, span in spans for token in row.tokens[span.start : span.stop]]
        positions = [at for _, span in spans for at in span]
        if given["input_ids"].tolist() != [tokens] or given["position_ids"].tolist() != [positions]:
            raise RuntimeError("the packed pass does not run the tokens of its rows in their order")
        wanted = given["logits_indices"][: max(1, sum(part.draws for part in parts))]
        if self._keeps_logits:
            given["logits_to_keep"] = wanted
        logits = self._model(**given).logits[0]
        return cast("Tensor", (logits if self._keeps_logits else logits[wanted]).float())

    def _hand_back(self, drawing: Sequence[_Part]) -> None:
        """Pass the drawn tokens to the scheduler. It keeps rows without one until they are dropped."""
        drawn = [part.row.answer[-1] if part.row.answer else 0 for part in drawing]
        into: Tensor = self._processor.inputs_and_outputs.output_ids
        into[0, : len(drawn)] = torch.tensor(drawn, dtype=into.dtype, device=into.device)
        self._processor.update_batch()

    @torch.inference_mode()
    def _compare(self) -> None:
        """Run two prompts packed, and each by itself: a model that passes no cache on would answer, and answer wrongly."""
        vocabulary = int(self._model.config.get_text_config(decoder=True).vocab_size)
        prompts = [tuple((7 * i + 3 * at) % vocabulary for at in range(length)) for i, length in enumerate((5, 12))]
        requests = [GenerationRequest(id="comparison", prompt=prompt, max_new_tokens=2) for prompt in prompts]
        self._add([Row.of(one, lambda message: None, self._rows.tokenizer) for one in requests])
        while self._running:
            parts = self._next_parts()
            drawing = [part for part in parts if part.draws]
            for part, packed in zip(drawing, self._forward(parts), strict=False):
                alone = self._model(input_ids=torch.tensor([part.row.tokens], device=packed.device), use_cache=False)
                expected = alone.logits[0, -1]
                allowed = math.sqrt(torch.finfo(expected.dtype).eps) * (expected - expected.mean()).float().norm()
                if (packed - expected).norm() > allowed:
                    raise UsageError(
                        f"{type(self._model).__name__} computes something else under continuous batching than alone.\n"
                        "Use --backend eager."
                    )
                part.row.answer.append(int(expected.argmax()))
            self._hand_back(drawing)
            self._drop([part.row for part in drawing if len(part.row.answer) == part.row.request.max_new_tokens])


def _key(row: Row) -> str:
    """Unique among the rows that run; the names of requests are their clients' business."""
    return str(id(row))


def _pages(row: Row) -> int:
    return math.ceil((len(row.request.prompt) + row.request.max_new_tokens) / PAGE_TOKENS)


@contextmanager
def _refused_plainly(model: nn.Module) -> Generator[None, None, None]:
    """Whatever a stranger's model or another version of transformers raises at the start becomes a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UsageError(
            f"The cache of continuous batching does not fit into memory: {printable(str(error))}.\n"
            "Give a smaller --max-batch, or --backend eager."
        ) from error
    except Exception as error:  # its insides are private and change: whatever they raise, users have another backend
        raise UsageError(
            f"{type(model).__name__} does not run under the continuous batching of the installed transformers: "
            f"{printable(str(error))}.\nUse --backend eager."
        ) from error


def _processor(model: Any, max_batch: int, pass_tokens: int) -> Any:
    """The batch processor of transformers with a cache for `max_batch` rows; the thread that would drive it is not started."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config: Any = model.config.get_text_config(decoder=True)
    if config._attn_implementation == "eager":
        raise UsageError(
            f"{type(model).__name__} was loaded with eager attention; continuous batching takes sdpa or a flash kernel.\n"
            "Use --backend eager."
        )
    positions = int(getattr(config, "max_position_embeddings", 0) or ROW_TOKENS)
    made = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),  # rows end when we say so
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=max_batch * math.ceil(min(positions, ROW_TOKENS) / PAGE_TOKENS),
            max_batch_tokens=pass_tokens,
            max_requests_per_batch=max_batch,
            max_blocks_per_request=0,  # no kernel that reads the pages itself: one path, the one that is tested
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            safety_margin=0.0,  # `fits` keeps room for whole answers
            auto_switch_to_flash=False,
        ),
    )
    made.warmup()
    windowed = set(made.batch_processor.cache.cache_allocators) - {"full_attention"}
    if windowed:
        raise UsageError(
            f"{type(model).__name__} has blocks with {printable(', '.join(sorted(windowed)))}; the continuous backend "
            "takes models with full attention alone.\nUse --backend eager."
        )
    return made.batch_processor
