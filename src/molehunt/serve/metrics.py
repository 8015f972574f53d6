"""Metrics for Prometheus: requests, tokens, verdicts, scores, coverage, waiting and time to first token."""

from collections.abc import Callable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from molehunt.serve.guard import Settled
from molehunt.serve.keys import App, Receive, Scope, Send

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SCORES = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 40.0, 80.0)
FIRST_TOKEN_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """One registry per server, so that two in one process do not add up."""

    def __init__(self, load: Callable[[], tuple[int, int]]) -> None:
        """`load` says how many requests decode and how many wait."""
        self._registry = CollectorRegistry()
        make: Any = {"registry": self._registry, "namespace": "molehunt"}
        self.requests = Counter("requests", "Requests by route and HTTP status.", ["route", "status"], **make)
        self._tokens = Counter("tokens", "Tokens by kind.", ["kind"], **make)
        self._verdicts = Counter("verdicts", "Answers by verdict and action.", ["verdict", "action"], **make)
        self._score = Histogram("score", "Guard score of each answer, nats.", buckets=SCORES, **make)
        self._uncovered = Counter("uncovered", "Answers with coverage below 1.", **make)
        self._coverage = Gauge("coverage", "Coverage of the newest answer.", **make)
        self.first_token = Histogram(
            "first_token_seconds", "Seconds until the first judged token.", buckets=FIRST_TOKEN_S, **make
        )
        Gauge("decoding", "Requests that decode now.", **make).set_function(lambda: load()[0])
        Gauge("waiting", "Requests that wait for a place.", **make).set_function(lambda: load()[1])

    def settled(self, one: Settled) -> None:
        self._tokens.labels("prompt").inc(len(one.finished.prompt))
        self._tokens.labels("answer").inc(len(one.finished.answer))
        self._verdicts.labels("flagged" if one.verdict.flagged else "unflagged", one.verdict.action).inc()
        if one.verdict.score is not None:
            self._score.observe(one.verdict.score)
        self._coverage.set(one.verdict.coverage)
        if one.verdict.coverage < 1:
            self._uncovered.inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


class Counted:
    """ASGI middleware: counts responses by route and status, and leaves streams and disconnects alone."""

    def __init__(self, app: App, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                path = str(getattr(scope.get("route"), "path", "none"))  # not what a client wrote: labels must stay few
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, send_counted)
