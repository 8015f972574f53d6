"""Connections that send no whole request are closed, so that nobody without a key can hold all of them."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 10.0
"""Seconds in which a request's line and headers must have come, from the connection or from their first byte."""


class ImpatientProtocol(H11Protocol):
    """uvicorn's protocol for HTTP/1.1 with a deadline for the head of each request.

    uvicorn itself closes a connection that is silent after a response. It has no limit for one that never sends a
    request, or only half of one.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and not self._answering():
            self._expect_head()
        super().data_received(data)
        if self._answering():
            self._forget()

    def _answering(self) -> bool:
        """Whether a whole head came and its response is not complete yet."""
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _expect_head(self) -> None:
        self._forget()
        self._deadline = self.loop.call_later(HEADERS_S, self._too_late)

    def _too_late(self) -> None:
        self._deadline = None
        if not self._answering() and not self.transport.is_closing():
            self.transport.close()

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
