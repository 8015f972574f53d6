"""The live page: score stream, alerts to review, calibration and drift, and both models on one prompt."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from markupsafe import Markup, escape

from molehunt.errors import MolehuntError
from molehunt.model.pair import ModelPair
from molehunt.report.escape import visible
from molehunt.report.html import TEMPLATES as REPORT_TEMPLATES
from molehunt.report.html import escaping
from molehunt.report.watch_text import suspects
from molehunt.serve.completions import read_body
from molehunt.serve.engine import Engine
from molehunt.serve.feed import Feed
from molehunt.serve.guard import Guard
from molehunt.serve.keys import COOKIE, LOGIN, Keys
from molehunt.serve.model_comparison import ModelComparison, compare_models
from molehunt.serve.wire import Refused
from molehunt.watch.alert import Alert

TEMPLATES = Path(__file__).parent / "templates"
SHOWN = 20
"""Number of alerts on the page; older ones are in the ledger."""
MAX_FORM = 64 << 10
MAX_PROMPT = 2000
"""Greatest number of characters that the ask box takes."""
ASK_WITHIN_S = 120
ALIVE_S = 15
"""Seconds after which a silent stream says that it is alive, so that proxies keep it open."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LivePage:
    """Routes of the page of one server. Whatever a model or a client wrote is escaped, and controls are spelled out."""

    pair: ModelPair
    engine: Engine
    guard: Guard
    feed: Feed
    keys: Keys
    model_name: str

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/", self.page, methods=["GET"])
        app.add_api_route(LOGIN, self.login_form, methods=["GET"])
        app.add_api_route(LOGIN, self.login, methods=["POST"])
        app.add_api_route("/live/page.css", self.css, methods=["GET"])
        app.add_api_route("/live/page.js", self.script, methods=["GET"])
        app.add_api_route("/live/events", self.events, methods=["GET"])
        app.add_api_route("/live/alerts", self.alerts, methods=["GET"])
        app.add_api_route("/live/standing", self.standing, methods=["GET"])
        app.add_api_route("/live/alerts/{id}/review", self.review, methods=["POST"])
        app.add_api_route("/live/ask", self.ask, methods=["POST"])

    async def page(self) -> Response:
        page = (
            _environment()
            .get_template("live.html.j2")
            .render(
                model=self.model_name,
                action=self.guard.action,
                fpr=self.guard.fpr,
                threshold=self.guard.threshold,
                alerts=Markup(await self._alerts()),
                standing=Markup(self._standing()),
                most=MAX_PROMPT,
            )
        )
        return HTMLResponse(page)

    def login_form(self) -> Response:
        return HTMLResponse(_environment().get_template("login.html.j2").render(wrong=False), status_code=401)

    async def login(self, request: Request) -> Response:
        form = parse_qs((await read_body(request, MAX_FORM)).decode("utf-8", "replace"))
        if not self.keys.opens(form.get("key", [""])[0]):
            return HTMLResponse(_environment().get_template("login.html.j2").render(wrong=True), status_code=401)
        back = RedirectResponse("/", status_code=303)
        back.set_cookie(
            COOKIE, self.keys.cookie, httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )
        return back

    def css(self) -> Response:
        report = (REPORT_TEMPLATES / "report.css").read_text(encoding="utf-8")
        own = (TEMPLATES / "live.css").read_text(encoding="utf-8")
        return PlainTextResponse(report + own, media_type="text/css")

    def script(self) -> Response:
        return PlainTextResponse((TEMPLATES / "live.js.j2").read_text(encoding="utf-8"), media_type="text/javascript")

    async def events(self) -> Response:
        return StreamingResponse(self._messages(), media_type="text/event-stream")

    async def _messages(self) -> AsyncGenerator[str, None]:
        page = self.feed.open()
        try:
            yield f"retry: 2000\nevent: opened\ndata: {json.dumps(self.feed.recent())}\n\n"
            while True:
                try:
                    message = await asyncio.wait_for(page.get(), ALIVE_S)
                except TimeoutError:
                    message = ": alive\n\n"
                if message is None:
                    return
                yield message
        finally:
            self.feed.close(page)

    async def alerts(self) -> Response:
        return HTMLResponse(await self._alerts())

    async def _alerts(self) -> str:
        found = await asyncio.to_thread(self.guard.ledger.recent, SHOWN)
        pending = await asyncio.to_thread(self.guard.ledger.pending)
        return _environment().get_template("alerts.html.j2").render(alerts=found, pending=pending)

    def standing(self) -> Response:
        return HTMLResponse(self._standing())

    def _standing(self) -> str:
        state = self.guard.state
        fields = {
            "n": len(state.monitor.calibration),
            "fpr": self.guard.fpr,
            "threshold": self.guard.threshold,
            "seen": state.seen,
            "flagged": state.flagged,
            "expected": state.seen * self.guard.fpr,
            "suspects": suspects(state.suspects),
            "drift": state.drift,
            "wealth": math.exp(min(700.0, state.drift.log_wealth)),
            "alarm_at": 1 / state.drift.level,
            "clean": {q: float(state.monitor.calibration.quantile(q)) for q in (0.5, 0.9, 0.99)},
            "live": {q: float(state.scores.quantile(q)) for q in (0.5, 0.9, 0.99)} if state.scores.n else None,
        }
        return _environment().get_template("standing.html.j2").render(**fields)

    async def review(self, id: str, request: Request) -> Response:
        form = parse_qs((await read_body(request, MAX_FORM)).decode("utf-8", "replace"))
        status = form.get("status", [""])[0]
        if status not in ("confirmed", "dismissed"):
            raise Refused(400, "a review says confirmed or dismissed", param="status")
        try:
            await asyncio.to_thread(self.guard.ledger.review, id, status)
        except MolehuntError as error:
            raise Refused(409, str(error)) from None
        if status == "dismissed":
            self.guard.dismissed()
        self.feed.send("reviewed", {"id": id, "status": status})
        return RedirectResponse("/", status_code=303)

    async def ask(self, request: Request) -> Response:
        body = await read_body(request, MAX_FORM)
        try:
            prompt = json.loads(body)["prompt"]
        except (ValueError, TypeError, KeyError):
            raise Refused(400, 'the body is {"prompt": "…"}', param="prompt") from None
        if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > MAX_PROMPT:
            raise Refused(400, f"a prompt is text of 1 to {MAX_PROMPT} characters", param="prompt")
        try:
            promised = self.engine.between(
                lambda: compare_models(self.pair, self.guard.bank, self.guard.state.monitor, prompt)
            )
            found = await asyncio.wait_for(asyncio.wrap_future(promised), ASK_WITHIN_S)
        except TimeoutError:
            raise Refused(503, "the model is too busy to answer", retry_s=5) from None
        except MolehuntError as error:
            raise Refused(400, str(error), param="prompt") from None
        flagged = self.guard.beyond(found.judged.score)
        page = (
            _environment()
            .get_template("asked.html.j2")
            .render(
                one=found,
                threshold=self.guard.threshold,
                flagged=flagged,
                tuned=_two(found, found.tuned),
                base=_two(found, found.base),
            )
        )
        return JSONResponse({"html": page, "flagged": flagged, "score": found.judged.score})


def _environment() -> Any:
    made = escaping(TEMPLATES)
    filters: dict[str, Any] = {"visible": visible, "lines": _lines, "shaded": _of_alert}
    made.filters.update(filters)
    return made


def _lines(text: str) -> str:
    return visible(text, keep_lines=True)


def _of_alert(alert: Alert) -> Markup:
    return shaded(alert.tokens, alert.token_scores, max(alert.token_scores, default=0.0))


def _two(found: ModelComparison, scores: Sequence[float]) -> Markup:
    """Both rows of the ask box are shaded on one scale, so that they can be compared."""
    return shaded(found.tokens, scores, max(*found.tuned, *found.base), answer_at=found.answer_at)


def shaded(tokens: Sequence[str], scores: Sequence[float], highest: float, *, answer_at: int | None = None) -> Markup:
    """Tokens as spans, each as dark as it scores; the number itself is in the title."""
    spans: list[Markup] = []
    for i, (token, score) in enumerate(zip(tokens, scores, strict=True)):
        if i == answer_at:
            spans.append(Markup('<span class="arrow" aria-label="answer">→</span>'))
        share = max(0.0, score) / highest if highest > 0 and math.isfinite(score) else 0.0
        text = Markup("<br>").join(escape(visible(part)) for part in token.split("\n"))
        spans.append(
            Markup('<span class="s{}" title="{}">{}</span>').format(min(9, int(10 * share)), f"{score:.1f}", text)
        )
    return Markup("").join(spans)
