"""A connection that sends no whole request is closed; one that is answered slowly is not."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import httpx
import pytest
import uvicorn

from molehunt.serve import connections
from molehunt.serve.connections import ImpatientProtocol

Message = MutableMapping[str, Any]
SLOW = 0.9


async def app(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    if scope["type"] != "http":
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(SLOW)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connections, "HEADERS_S", 0.3)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = uvicorn.Server(uvicorn.Config(app, http=ImpatientProtocol, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(10)


def closed_after(port: int, *parts: bytes, pause: float = 0.0, wait: float = 5.0) -> float | None:
    """Seconds after which the server closes a connection that sent these parts; None where it is open after `wait`."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", port))) as one:
        began = time.monotonic()
        for part in parts:
            one.sendall(part)
            time.sleep(pause)
        one.settimeout(wait)
        try:
            while one.recv(4096):
                pass
        except TimeoutError:
            return None
        except ConnectionResetError:
            pass
        return time.monotonic() - began


def test_half_a_head_no_byte_and_a_drop_at_a_time_are_closed(port: int) -> None:
    for parts in ((), (b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ",), (b"G",)):
        after = closed_after(port, *parts)
        assert after is not None and 0.2 < after < 3
    drops = [bytes([byte]) for byte in b"GET / HTTP/1.1\r\n"]
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        after = closed_after(port, *drops, pause=0.1)
        assert after is not None and after < 3


def test_half_a_second_request_on_an_open_connection_is_closed_too(port: int) -> None:
    whole = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    after = closed_after(port, whole, b"GET / HT", pause=0.1)
    assert after is not None and after < 3


def test_a_slow_answer_and_a_connection_that_is_used_again_are_not(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert client.get("/slow").text == "ok"
        time.sleep(0.1)
        assert client.get("/").text == client.get("/slow").text == "ok"
