"""The guarded server: OpenAI's routes, health, metrics and the live page, behind one key."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from molehunt.model.blocks import unwrapped
from molehunt.model.pair import ModelPair
from molehunt.model.roles import roled_prompt
from molehunt.model.sampling import Sampling
from molehunt.serve.backend import Eager
from molehunt.serve.completions import Completions
from molehunt.serve.continuous import Continuous
from molehunt.serve.engine import Engine
from molehunt.serve.feed import Feed
from molehunt.serve.guard import Guard, Settled
from molehunt.serve.keys import Doorkeeper, Keys
from molehunt.serve.live_page import LivePage
from molehunt.serve.metrics import CONTENT_TYPE, Counted, Metrics
from molehunt.serve.request import AnswerPiece, Ended, Failed, GenerationRequest, Overloaded
from molehunt.serve.wire import Refused
from molehunt.traffic.turn import Turn
from molehunt.watch.alert import Alert

SELF_TEST = "Say hello."
SELF_TEST_S = 120


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server: its names, its limits, its backend and its request log."""

    model_name: str
    hosts: frozenset[str] | None
    """Names that a Host header may have; None takes any."""
    default_new_tokens: int = 256
    max_body: int = 1 << 20
    backend: Literal["eager", "continuous"] = "eager"
    """Backend that runs a batch, see `serve.backend`."""
    max_batch: int = 16
    max_waiting: int = 256
    request_log: Path | None = None
    """A JSON line for each answer, without its text unless `log_text`."""
    log_text: bool = False


def create_app(pair: ModelPair, guard: Guard, keys: Keys, settings: Settings) -> FastAPI:
    """The application. Its engine starts with it; at the end it finishes every running answer first.

    Raises:
        UsageError: the backend cannot run this model.
    """
    with pair.tuned_model() as model:
        engine = Engine(
            model,
            pair.tokenizer,
            guard,
            backend=Continuous if settings.backend == "continuous" else Eager,
            max_batch=settings.max_batch,
            max_waiting=settings.max_waiting,
            layers_path=pair.layers_path,
        )
    metrics, feed = Metrics(engine.load), Feed()
    request_log = settings.request_log.open("a", encoding="utf-8") if settings.request_log else None
    _report_settled(guard, metrics, feed, request_log, pair, log_text=settings.log_text)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await asyncio.to_thread(engine.close)
            await asyncio.to_thread(guard.close)
            if request_log is not None:
                request_log.close()

    app = FastAPI(title="Molehunt", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    completions = Completions(
        engine=engine,
        tokenizer=pair.tokenizer,
        metrics=metrics,
        model_name=settings.model_name,
        max_tokens=_positions(pair),
        default_new_tokens=settings.default_new_tokens,
        max_body=settings.max_body,
        sampling=_own_sampling(pair),
        vocabulary=_vocabulary(pair),
    )
    _add_routes(app, completions, metrics)
    LivePage(pair=pair, engine=engine, guard=guard, feed=feed, keys=keys, model_name=settings.model_name).add_to(app)
    _add_error_handlers(app)
    app.state.feed = feed
    app.add_middleware(Counted, metrics=metrics)  # pyright: ignore[reportArgumentType]
    app.add_middleware(Doorkeeper, keys=keys, hosts=settings.hosts)  # pyright: ignore[reportArgumentType]
    return app


def _report_settled(
    guard: Guard, metrics: Metrics, feed: Feed, request_log: TextIO | None, pair: ModelPair, *, log_text: bool
) -> None:
    """Send what the guard settles to the metrics, the live page and the request log."""

    def settled(one: Settled) -> None:
        metrics.settled(one)
        feed.settled(one)
        if request_log is not None:
            print(json.dumps(_log_fields(one, pair, log_text=log_text)), file=request_log, flush=True)

    def explained(alert: Alert) -> None:
        feed.send("explained", {"id": alert.id})

    guard.on_settled = settled
    guard.on_explained = explained


def _add_routes(app: FastAPI, completions: Completions, metrics: Metrics) -> None:
    """Health, readiness, metrics and OpenAI's routes."""
    started = int(time.time())
    readiness = _Readiness(completions)

    def health() -> dict[str, str]:
        return {"status": "ok"}

    served = {"id": completions.model_name, "object": "model", "created": started, "owned_by": "molehunt"}

    def models() -> dict[str, Any]:
        return {"object": "list", "data": [served]}

    def model(id: str) -> dict[str, Any]:
        if id != completions.model_name:
            raise completions.other_model()
        return served

    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/ready", readiness.answer, methods=["GET"])
    app.add_api_route("/metrics", lambda: PlainTextResponse(metrics.text(), media_type=CONTENT_TYPE), methods=["GET"])
    app.add_api_route("/v1/models", models, methods=["GET"])
    app.add_api_route("/v1/models/{id:path}", model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", completions.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", completions.completion, methods=["POST"], response_model=None)


def _add_error_handlers(app: FastAPI) -> None:
    """Errors in OpenAI's shape; a fault of the server reveals nothing of the machine."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        headers = {} if error.retry_s is None else {"retry-after": str(error.retry_s)}
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        return JSONResponse(Refused(error.status_code, str(error.detail)).body(), status_code=error.status_code)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return JSONResponse(Refused(500, "a fault in the server").body(), status_code=500)


class _Readiness:
    """Answers /ready. The model is tested at the first request, and once it has passed, not again."""

    def __init__(self, completions: Completions) -> None:
        self._completions = completions
        self._lock = asyncio.Lock()
        self._tested = False

    async def answer(self) -> Response:
        engine = self._completions.engine
        async with self._lock:
            self._tested = self._tested or await _self_test(self._completions, engine)
        ready = self._tested and engine.alive and engine.guard.healthy
        return JSONResponse({"ready": ready}, status_code=200 if ready else 503)


async def _self_test(completions: Completions, engine: Engine) -> bool:
    """Run a fixed prompt through the model. True if every token was scored."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Ended | Failed] = loop.create_future()

    def hear(one: AnswerPiece | Ended | Failed) -> None:
        if not isinstance(one, AnswerPiece):
            loop.call_soon_threadsafe(lambda: ended.done() or ended.set_result(one))

    prompt = roled_prompt(completions.tokenizer, [Turn("user", SELF_TEST)]).ids
    try:
        engine.submit(GenerationRequest(id="self-test", prompt=prompt, max_new_tokens=4), hear)
        found = await asyncio.wait_for(ended, SELF_TEST_S)
    except (Overloaded, TimeoutError):
        return False
    return isinstance(found, Ended) and found.verdict.coverage == 1


def _log_fields(one: Settled, pair: ModelPair, *, log_text: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "time": round(time.time(), 3),
        "request": one.finished.request,
        "prompt_tokens": len(one.finished.prompt),
        "answer_tokens": len(one.finished.answer),
        "reason": one.finished.reason,
        "flagged": one.verdict.flagged,
        "score": one.verdict.score,
        "p_value": one.verdict.p_value,
        "coverage": one.verdict.coverage,
        "action": one.verdict.action,
        "direction": one.verdict.direction,
        "alert": one.verdict.alert,
    }
    if log_text:
        fields["prompt"] = str(pair.tokenizer.decode(list(one.finished.prompt)))
        fields["answer"] = str(pair.tokenizer.decode(list(one.finished.answer), skip_special_tokens=True))
    return fields


def _positions(pair: ModelPair) -> int:
    with pair.tuned_model() as model:
        config: Any = unwrapped(model).config
    return int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", 0) or 1 << 20)


def _vocabulary(pair: ModelPair) -> int:
    with pair.tuned_model() as model:
        embedding: Any = cast("Any", model).get_input_embeddings()
    return min(len(pair.tokenizer), int(embedding.weight.shape[0]))


def _own_sampling(pair: ModelPair) -> Sampling:
    with pair.tuned_model() as model:
        own: Any = getattr(unwrapped(model), "generation_config", None)
    if own is None or not own.do_sample:
        return Sampling()
    return Sampling(
        temperature=1.0 if own.temperature is None else float(own.temperature),
        top_p=1.0 if own.top_p is None else float(own.top_p),
        top_k=max(0, int(own.top_k or 0)),
        repetition_penalty=float(own.repetition_penalty or 1.0),
    )
