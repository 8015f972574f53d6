"""One HTTP request through the engine and back: whole or as a stream, and stopped when its client leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from uuid import uuid4

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers import PreTrainedTokenizerBase

from molehunt.errors import InvalidInput
from molehunt.model.roles import roled_prompt
from molehunt.serve.engine import Engine
from molehunt.serve.metrics import Metrics
from molehunt.serve.request import AnswerPiece, Ended, Failed, GenerationRequest, Overloaded
from molehunt.serve.sampling import Sampling, TokenLogprobs
from molehunt.serve.wire import ChatRequest, CompletionRequest, Refused, Shape, read_request

Message = AnswerPiece | Ended | Failed
"""A message of the engine about one request."""
RETRY_S = 2
BODY_WITHIN_S = 30
"""Seconds that a client may take to send its request."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Completions:
    """Both completion routes of one engine."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    metrics: Metrics
    model_name: str
    max_tokens: int
    """Greatest number of tokens of prompt and answer together: the positions of the model."""
    default_new_tokens: int
    max_body: int
    sampling: Sampling
    """Settings for a request without any: those of the model's own generation config, else greedy."""

    async def chat(self, request: Request) -> Response:
        wanted = read_request(ChatRequest, await read_body(request, self.max_body))
        try:
            roled = roled_prompt(self.tokenizer, wanted.turns)
        except InvalidInput as error:
            raise Refused(400, str(error), param="messages") from None
        limit = wanted.max_completion_tokens or wanted.max_tokens
        generation = self._generation(wanted, roled.ids, limit, wanted.wanted_logprobs)
        return await self._answer(request, wanted, generation, chat=True)

    async def completion(self, request: Request) -> Response:
        wanted = read_request(CompletionRequest, await read_body(request, self.max_body))
        prompt = wanted.one_prompt
        ids = tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
        vocabulary = len(self.tokenizer)
        if any(not 0 <= token < vocabulary for token in ids):
            raise Refused(400, f"token ids lie in 0..{vocabulary - 1}", param="prompt")
        return await self._answer(
            request, wanted, self._generation(wanted, ids, wanted.max_tokens, wanted.logprobs), chat=False
        )

    def _generation(
        self, wanted: ChatRequest | CompletionRequest, ids: tuple[int, ...], limit: int | None, logprobs: int | None
    ) -> GenerationRequest:
        if wanted.model != self.model_name:
            raise Refused(404, f"the model here is {self.model_name}", param="model", code="model_not_found")
        if not ids:
            raise Refused(400, "the prompt has no tokens", param="prompt")
        room = self.max_tokens - len(ids)
        if room < 1 or (limit is not None and limit > room):
            raise Refused(
                400,
                f"{len(ids)} prompt tokens{'' if limit is None else f' and {limit} to generate'} are more than the "
                f"{self.max_tokens} that this model takes",
                param="messages" if isinstance(wanted, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        own = self.sampling
        return GenerationRequest(
            id=uuid4().hex,
            prompt=ids,
            max_new_tokens=min(self.default_new_tokens, room) if limit is None else limit,
            sampling=Sampling(
                temperature=own.temperature if wanted.temperature is None else wanted.temperature,
                top_p=own.top_p if wanted.top_p is None else wanted.top_p,
                seed=wanted.seed,
            ),
            stop=wanted.stops,
            logprobs=logprobs,
        )

    async def _answer(
        self, request: Request, wanted: ChatRequest | CompletionRequest, generation: GenerationRequest, *, chat: bool
    ) -> Response:
        loop = asyncio.get_running_loop()
        messages: asyncio.Queue[Message] = asyncio.Queue()
        start = loop.time()

        def hear(one: Message) -> None:
            loop.call_soon_threadsafe(messages.put_nowait, one)

        try:
            self.engine.submit(generation, hear)
        except Overloaded as error:
            closing = not self.engine.alive
            raise Refused(503 if closing else 429, str(error), code="overloaded", retry_s=RETRY_S) from None
        shape = Shape(chat=chat, id=generation.id, model=self.model_name, tokenizer=self.tokenizer)
        headers = {"x-request-id": generation.id, "x-guard-action": self.engine.guard.action}
        if wanted.ignored:
            headers["x-ignored-fields"] = ", ".join(
                name for name in wanted.ignored if name.isascii() and name.isprintable()
            )
        try:
            first = await _unless_gone(request, messages.get)  # judged before anything is sent
            self.metrics.first_token.observe(loop.time() - start)
            if wanted.stream and not isinstance(first, Failed):
                chunks = self._chunks(generation, shape, first, messages, usage=wanted.wants_usage)
                return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
            return await self._whole(request, generation, shape, first, messages, headers)
        except BaseException:
            self.engine.cancel(generation.id)
            raise

    async def _whole(
        self,
        request: Request,
        generation: GenerationRequest,
        shape: Shape,
        first: Message,
        messages: "asyncio.Queue[Message]",
        headers: dict[str, str],
    ) -> Response:
        text: list[str] = []
        logprobs: list[TokenLogprobs] = []
        one = first
        while isinstance(one, AnswerPiece):
            text.append(one.text)
            logprobs += one.logprobs
            one = await _unless_gone(request, messages.get)
        if isinstance(one, Failed):
            raise Refused(503, one.message, code="guard_unavailable", retry_s=RETRY_S)
        verdict = one.verdict
        if verdict.action != "log":
            headers["x-guard-flagged"] = str(verdict.flagged).lower()
            if verdict.score is not None:
                headers["x-guard-score"] = f"{verdict.score:.4f}"
                headers["x-guard-p-value"] = f"{verdict.p_value:.3g}"
        headers["x-guard-coverage"] = f"{verdict.coverage:.4g}"
        body = shape.whole("".join(text), None if generation.logprobs is None else logprobs, one)
        return JSONResponse(body, headers=headers)

    async def _chunks(
        self,
        generation: GenerationRequest,
        shape: Shape,
        first: Message,
        messages: "asyncio.Queue[Message]",
        *,
        usage: bool,
    ) -> AsyncGenerator[str, None]:
        ended = False
        try:
            if (opening := shape.first()) is not None:
                yield _event(opening)
            one = first
            while isinstance(one, AnswerPiece):
                yield _event(shape.piece(one.text, one.logprobs or None))
                one = await messages.get()
            ended = True
            if isinstance(one, Failed):
                yield _event(Refused(503, one.message, code="guard_unavailable").body())
                return
            yield _event(shape.last(one))
            if usage:
                yield _event(shape.usage(one))
            yield "data: [DONE]\n\n"
        finally:
            if not ended:  # the client has gone
                self.engine.cancel(generation.id)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises Refused for one that is too large, or that comes too slowly."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_WITHIN_S):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise Refused(413, f"a body has at most {limit} bytes", code="body_too_large")
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_WITHIN_S} s") from None
    return bytes(body)


async def _unless_gone(request: Request, get: Callable[[], Awaitable[Message]]) -> Message:
    """The next message. Raises Refused if the client leaves first; nobody will read the error."""
    wanted = asyncio.ensure_future(get())
    gone = asyncio.ensure_future(request.receive())  # the body was read: what can still come is a disconnect
    try:
        await asyncio.wait((wanted, gone), return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise Refused(499, "the client has gone")
    finally:
        wanted.cancel()
        gone.cancel()


def _event(data: object) -> str:
    return f"data: {json.dumps(data, allow_nan=False)}\n\n"
