"""A language model behind an OpenAI-compatible URL, which answers one request at a time."""

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from string import Template
from typing import Any, ClassVar
from urllib.parse import urlsplit

from molehunt.errors import UsageError, printable

TIMEOUT_S = 60.0
MAX_BYTES = 1 << 20
"""Greatest size of an answer's body."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class EndpointUnavailable(UsageError):
    """The endpoint gave no answer: it was not reached, it refused, or its answer has another form than requested."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """A key is not sent on to wherever the answer points."""


@dataclass(frozen=True, kw_only=True)
class ChatEndpoint:
    """A model that answers requests. A subclass says what is requested.

    Raises:
        UsageError: the URL is not valid, or the key would go to another machine without encryption.
    """

    wanted: ClassVar[str] = "answer"
    unavailable: ClassVar[type[EndpointUnavailable]] = EndpointUnavailable

    url: str
    """Address up to and including the version, such as `http://127.0.0.1:8000/v1`."""
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            parts, host = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.query or parts.fragment:
            raise UsageError(
                f"{printable(self.url)} is no URL of an OpenAI-compatible server; such as https://HOST/v1, without a user, "
                "a query or a fragment."
            )
        if self.key and parts.scheme == "http" and host not in LOOPBACK:
            raise UsageError(
                f"{printable(self.url)} is another machine without TLS: the key in $OPENAI_API_KEY would be sent in clear. "
                "Use https, or unset the key."
            )
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise UsageError("$OPENAI_API_KEY holds signs that no key has, such as a line break.")

    def ask(self, content: str) -> str:
        """The answer to one user turn. It is untrusted text.

        Raises:
            EndpointUnavailable: no answer came. The error has the class that `unavailable` names.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout_s) as response:
                raw = response.read(MAX_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode("utf-8", "replace")
            raise self.refused(f"it answered {error.code}: {said}") from None
        except (OSError, HTTPException) as error:  # refused, timed out, cut off
            raise self.refused(f"{getattr(error, 'reason', None) or error or type(error).__name__}") from None
        if len(raw) > MAX_BYTES:
            raise self.refused("its answer is longer than 1 MiB")
        try:
            answer = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            answer = None
        if not isinstance(answer, str):
            raise self.refused(f"its answer is no chat completion: {raw[:200].decode('utf-8', 'replace')}")
        return answer

    def refused(self, why: str) -> EndpointUnavailable:
        """The error to raise, without the key."""
        shown = printable(why.replace(self.key, "…") if self.key else why, 300)
        return self.unavailable(f"{printable(self.url)} gave no {self.wanted}: {shown}")


def marked(template: Path, texts: str, /, **more: object) -> str:
    """The template, filled in: $texts becomes `texts`, and $mark a line that no text can contain, to be put around them.

    Args:
        template: a file with `string.Template` fields.
        texts: untrusted text, line by line as JSON.
        more: further fields.
    """
    mark = hashlib.sha256(texts.encode("utf-8", "replace")).hexdigest()[:32]  # text cannot hold its own hash
    fields: Mapping[str, object] = {**more, "mark": mark, "texts": texts}
    return Template(template.read_text(encoding="utf-8")).substitute(fields)
