"""Messages to the live page while answers are generated: the newest of them, and a message for each new one."""

import asyncio
import json
import threading
import time
from collections import deque
from typing import Any

from molehunt.serve.guard import Settled

SHOWN = 240
"""Number of answers that a page shows when it opens."""
BEHIND = 256
"""Number of messages that a slow page may be behind; of more, it misses the oldest."""


class Feed:
    """Fan-out from the guard's thread to the pages that are open. No text of a request passes through it."""

    def __init__(self) -> None:
        self._recent: deque[dict[str, Any]] = deque(maxlen=SHOWN)
        self._pages: dict[asyncio.Queue[str | None], asyncio.AbstractEventLoop] = {}
        self._lock = threading.Lock()
        self._ended = False

    def settled(self, one: Settled) -> None:
        """Send a settled answer to every open page."""
        message = {
            "id": one.finished.request,
            "time": time.time(),
            "score": one.verdict.score,
            "flagged": one.verdict.flagged,
            "coverage": one.verdict.coverage,
            "alert": one.verdict.alert,
        }
        with self._lock:
            self._recent.append(message)
        self.send("scored", message)

    def recent(self) -> list[dict[str, Any]]:
        """The newest answers, oldest first."""
        with self._lock:
            return list(self._recent)

    def send(self, event: str, data: object) -> None:
        """Send a message to every open page, from any thread."""
        self._to_all(f"event: {event}\ndata: {json.dumps(data)}\n\n")

    def end(self) -> None:
        """Let go of every page: a server that shuts down waits for its streams."""
        self._ended = True
        self._to_all(None)

    def _to_all(self, message: str | None) -> None:
        with self._lock:
            pages = list(self._pages.items())
        for page, loop in pages:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, page, message)

    def open(self) -> "asyncio.Queue[str | None]":
        """Messages for a page of the running event loop, None at the end; `close` it."""
        page: asyncio.Queue[str | None] = asyncio.Queue(BEHIND)
        with self._lock:
            self._pages[page] = asyncio.get_running_loop()
        if self._ended:
            page.put_nowait(None)
        return page

    def close(self, page: "asyncio.Queue[str | None]") -> None:
        with self._lock:
            self._pages.pop(page, None)


def _put(page: "asyncio.Queue[str | None]", message: str | None) -> None:
    if page.full():
        page.get_nowait()
    page.put_nowait(message)
