"""One HTTP request through the engine and back: whole or as a stream, and stopped when its client leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers import PreTrainedTokenizerBase

from molehunt.errors import InvalidInput
from molehunt.model.roles import roled_prompt
from molehunt.model.sampling import Sampling
from molehunt.serve.echo import echoed
from molehunt.serve.engine import Engine
from molehunt.serve.metrics import Metrics
from molehunt.serve.request import AnswerPiece, Ended, Failed, GenerationRequest, Listener, Overloaded
from molehunt.serve.response import AnswerChoice, Shape
from molehunt.serve.wire import MODEL_NOT_FOUND, ChatRequest, CompletionRequest, Refused, read_request
from molehunt.traffic.chat import default_template

Heard = tuple[int, AnswerPiece | Ended | Failed]
"""A message of the engine, with the index of the choice that it is about."""
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
    vocabulary: int
    """Number of token ids that the model and its tokenizer know."""

    async def chat(self, request: Request) -> Response:
        wanted = read_request(ChatRequest, await read_body(request, self.max_body))
        settings = wanted.template_settings
        try:
            roled = roled_prompt(self.tokenizer, wanted.turns, settings=settings)
        except InvalidInput as error:
            raise Refused(400, str(error), param="messages") from None
        limit = wanted.max_completion_tokens or wanted.max_tokens
        generation = self._generation(wanted, roled.ids, limit, wanted.wanted_logprobs)
        unread = [f"chat_template_kwargs.{name}" for name in unread_settings(self.tokenizer, settings)]
        choices = [AnswerChoice(index=0, logprobs=generation.logprobs is not None)]
        return await self._answer(request, wanted, [generation], choices, ignored=[*wanted.ignored, *unread])

    async def completion(self, request: Request) -> Response:
        wanted = read_request(CompletionRequest, await read_body(request, self.max_body))
        echoes, top = wanted.echoes, wanted.logprobs
        generations: list[GenerationRequest] = []
        choices: list[AnswerChoice] = []
        prompts = wanted.prompts
        for index, prompt in enumerate(prompts):
            ids = tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
            outside = next((token for token in ids if not 0 <= token < self.vocabulary), None)
            if outside is not None:
                raise Refused(400, f"prompt: {outside} is no token id here; they lie in 0..{self.vocabulary - 1}",
                              param="prompt")  # fmt: skip
            one = self._generation(wanted, ids, wanted.max_tokens, top)
            if len(prompts) > 1:  # one request: the alerts about its answers begin with one id
                one = replace(one, id=f"{_shared_id(generations or [one])}-{index}")
            generations.append(replace(one, prompt_logprobs=echoes and top is not None))
            echo = echoed(self.tokenizer, prompt, ids) if echoes else None
            if echo is not None and top is not None:
                await asyncio.to_thread(getattr, echo, "offsets")  # long prompts take a while
            choices.append(AnswerChoice(index=index, logprobs=top is not None, echo=echo))
        return await self._answer(request, wanted, generations, choices, ignored=wanted.ignored)

    def _generation(
        self, wanted: ChatRequest | CompletionRequest, ids: tuple[int, ...], limit: int | None, logprobs: int | None
    ) -> GenerationRequest:
        if wanted.model != self.model_name:
            raise self.other_model()
        if not ids:
            raise Refused(400, "the prompt has no tokens", param="prompt")
        room = self.max_tokens - len(ids)
        if room < (1 if limit is None else limit):
            raise Refused(
                400,
                f"{len(ids)} prompt tokens{'' if limit is None else f' and {limit} to generate'} are more than the "
                f"{self.max_tokens} that this model takes",
                param="messages" if isinstance(wanted, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        return GenerationRequest(
            id=uuid4().hex,
            prompt=ids,
            max_new_tokens=min(self.default_new_tokens, room) if limit is None else limit,
            sampling=self._sampling(wanted),
            stop=wanted.stops,
            logprobs=logprobs,
        )

    def other_model(self) -> Refused:
        """The refusal of a request for another model than the one that is served."""
        return Refused(404, f"the model here is {self.model_name}", param="model", code=MODEL_NOT_FOUND)

    def _sampling(self, wanted: ChatRequest | CompletionRequest) -> Sampling:
        given = {
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "top_k": None if wanted.top_k is None else max(0, wanted.top_k),
            "repetition_penalty": wanted.repetition_penalty,
        }
        own = {name: value for name, value in given.items() if value is not None}
        return replace(self.sampling, seed=wanted.seed, **own)

    async def _answer(
        self,
        request: Request,
        wanted: ChatRequest | CompletionRequest,
        generations: Sequence[GenerationRequest],
        choices: Sequence[AnswerChoice],
        *,
        ignored: Sequence[str],
    ) -> Response:
        loop = asyncio.get_running_loop()
        messages: asyncio.Queue[Heard] = asyncio.Queue()
        start = loop.time()
        id = _shared_id(generations)
        headers = {"x-request-id": id, "x-guard-action": self.engine.guard.action}
        if ignored:
            headers["x-ignored-fields"] = ", ".join(name for name in ignored if name.isascii() and name.isprintable())
        shape = Shape(
            choices,
            chat=isinstance(wanted, ChatRequest),
            id=id,
            model=self.model_name,
            tokenizer=self.tokenizer,
        )

        def listener(index: int) -> Listener:
            return lambda one: _put(loop, messages, (index, one))

        try:
            for index, generation in enumerate(generations):
                self.engine.submit(generation, listener(index))
            first = await _unless_gone(request, messages.get)  # judged before anything is sent
            self.metrics.first_token.observe(loop.time() - start)
            if wanted.stream and not isinstance(first[1], Failed):
                chunks = self._chunks(generations, shape, first, messages, usage=wanted.wants_usage)
                return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
            return await self._whole(request, shape, first, messages, headers)
        except Overloaded as error:
            self._cancel(generations)
            closing = not self.engine.alive
            raise Refused(503 if closing else 429, str(error), code="overloaded", retry_s=RETRY_S) from None
        except BaseException:
            self._cancel(generations)
            raise

    def _cancel(self, generations: Sequence[GenerationRequest]) -> None:
        for generation in generations:
            self.engine.cancel(generation.id)

    async def _whole(
        self,
        request: Request,
        shape: Shape,
        first: Heard,
        messages: "asyncio.Queue[Heard]",
        headers: dict[str, str],
    ) -> Response:
        index, one = first
        while True:
            choice = shape.choices[index]
            if isinstance(one, Failed):
                raise Refused(503, one.message, code="guard_unavailable", retry_s=RETRY_S)
            if isinstance(one, AnswerPiece):
                choice.pieces.append(one)
            else:
                choice.end = one
                if all(other.end for other in shape.choices):
                    break
            index, one = await _unless_gone(request, messages.get)
        verdict = shape.verdict
        if verdict.action != "log":
            headers["x-guard-flagged"] = str(verdict.flagged).lower()
            if verdict.score is not None:
                headers["x-guard-score"] = f"{verdict.score:.4f}"
                headers["x-guard-p-value"] = f"{verdict.p_value:.3g}"
        headers["x-guard-coverage"] = f"{verdict.coverage:.4g}"
        long = any(choice.echo is not None and choice.logprobs for choice in shape.choices)
        body = await asyncio.to_thread(shape.whole) if long else shape.whole()
        return JSONResponse(body, headers=headers)

    async def _chunks(
        self,
        generations: Sequence[GenerationRequest],
        shape: Shape,
        first: Heard,
        messages: "asyncio.Queue[Heard]",
        *,
        usage: bool,
    ) -> AsyncGenerator[str, None]:
        done = False
        began: set[int] = set()
        try:
            if (opening := shape.first()) is not None:
                yield _event(opening)
            index, one = first
            while True:
                choice = shape.choices[index]
                if isinstance(one, Failed):
                    yield _event(Refused(503, one.message, code="guard_unavailable").body())
                    return
                if index not in began:
                    began.add(index)
                    choice.pieces = [one] if isinstance(one, AnswerPiece) else []
                    if choice.echo is not None:
                        yield _event(await asyncio.to_thread(shape.echoed, choice, choice.echo))
                if isinstance(one, AnswerPiece):
                    if one.text or one.logprobs:
                        yield _event(shape.piece(choice, one))
                else:
                    choice.end = one
                    yield _event(shape.last(choice, one))
                    if all(other.end for other in shape.choices):
                        break
                index, one = await messages.get()
            done = True
            if usage:
                yield _event(shape.usage())
            yield "data: [DONE]\n\n"
        finally:
            if not done:  # the client has gone, or one of several answers failed
                self._cancel(generations)


def unread_settings(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> list[str]:
    """Names that a chat template does not mention, so that setting them changes nothing."""
    template = default_template(tokenizer) or ""
    return [name for name in settings if name not in template]


def _shared_id(generations: Sequence[GenerationRequest]) -> str:
    """What stands before the number of each answer in the ids of one request."""
    return generations[0].id.partition("-")[0]


def _put(loop: asyncio.AbstractEventLoop, messages: "asyncio.Queue[Heard]", one: Heard) -> None:
    loop.call_soon_threadsafe(messages.put_nowait, one)


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


async def _unless_gone(request: Request, get: Callable[[], Awaitable[Heard]]) -> Heard:
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
