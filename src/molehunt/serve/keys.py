"""Access control: one key on every route but health, one name for the host, and pages that nobody can frame."""

import hashlib
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from molehunt.errors import UsageError
from molehunt.serve.wire import Refused

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/health"})
LOGIN = "/login"
"""Takes the key itself, in a form."""
COOKIE = "molehunt"
SHORTEST_KEY = 16
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = (
    (b"content-security-policy", b"default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
     b"img-src data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),  # with none at all, forms would have no origin either
    (b"cache-control", b"no-store"),
)  # fmt: skip


def new_key() -> str:
    return secrets.token_urlsafe(24)


class Keys:
    """Compares a key in constant time, and lends a browser a cookie that is not the key."""

    def __init__(self, key: str) -> None:
        """Raises UsageError for a key that could be guessed or cannot stand in a header."""
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(f"a key has at least {SHORTEST_KEY} printable ASCII characters and no spaces")
        self._key = key.encode()
        self.cookie = hmac.new(self._key, b"molehunt live page", hashlib.sha256).hexdigest()

    def opens(self, key: str) -> bool:
        return hmac.compare_digest(self._key, key.encode(errors="replace"))

    def lets_in(self, headers: dict[bytes, bytes]) -> bool:
        """A bearer key, or the cookie of a browser that gave it."""
        kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if kind.lower() == "bearer":
            return self.opens(key.strip())
        try:
            found = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1")).get(COOKIE)
        except CookieError:
            return False
        return found is not None and hmac.compare_digest(self.cookie.encode(), found.value.encode(errors="replace"))


class Doorkeeper:
    """ASGI middleware: host, origin and key are checked before any route runs.

    Args:
        hosts: names that a Host header may have; None takes any, for a server that others reach by its own name.
    """

    def __init__(self, app: App, *, keys: Keys, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._keys = keys
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        headers = dict(scope["headers"])
        refused = self._refused(scope, headers)
        if refused is not None:
            await _answer(send_guarded, refused)
            return
        await self._app(scope, receive, send_guarded)

    def _refused(self, scope: Scope, headers: dict[bytes, bytes]) -> Refused | None:
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and _name(host) not in self._hosts:
            return Refused(421, "this server does not answer to that host name", code="wrong_host")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and scope["method"] not in ("GET", "HEAD") and origin.partition("://")[2] != host:
            return Refused(403, "requests from other sites are not served", code="wrong_origin")
        path = scope["path"]
        if path in OPEN or path == LOGIN or self._keys.lets_in(headers):
            return None
        if path == "/" and scope["method"] == "GET":  # a browser is shown where to give its key
            scope["path"], scope["raw_path"] = LOGIN, LOGIN.encode()
            return None
        return Refused(401, "no key, or a wrong one: send Authorization: Bearer KEY", code="invalid_api_key")


def _name(host: str) -> str:
    """A Host header without its port."""
    return host[1 : host.index("]")] if host.startswith("[") and "]" in host else host.rpartition(":")[0] or host


async def _answer(send: Send, refused: Refused) -> None:
    body = json.dumps(refused.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
