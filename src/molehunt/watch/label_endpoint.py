"""Labels of directions by a language model behind an OpenAI-compatible URL."""

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlsplit

from molehunt.errors import UsageError, printable

PROMPT = Path(__file__).parent / "label_prompt.md"
TIMEOUT_S = 60.0
MOST_BYTES = 1 << 20
"""Of an answer's body."""
LABEL_CHARS = 120
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class LabelUnavailable(UsageError):
    """The endpoint gave no label: not reached, refused, or no answer of the kind that was asked for."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """A key is not sent on to wherever the answer points."""


@dataclass(frozen=True, kw_only=True)
class LabelEndpoint:
    """A model that names what texts share.

    Raises:
        UsageError: the URL is none, or the key would go to another machine in clear.
    """

    url: str
    """Up to and with the version, such as `http://127.0.0.1:8000/v1`."""
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

    def label(self, texts: Sequence[str]) -> str:
        """What `texts` share, in a few words on one line; empty where the model sees no pattern.

        Texts stand in the prompt as JSON strings between marks that no text can hold. What comes back is a stranger's
        text all the same.

        Raises:
            LabelUnavailable: no label came.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt(texts)}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout_s) as response:
                raw = response.read(MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode("utf-8", "replace")
            raise self._unavailable(f"it answered {error.code}: {said}") from None
        except (OSError, HTTPException) as error:  # refused, timed out, cut off
            raise self._unavailable(f"{getattr(error, 'reason', None) or error or type(error).__name__}") from None
        if len(raw) > MOST_BYTES:
            raise self._unavailable("its answer is longer than 1 MiB")
        try:
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            content = None
        if not isinstance(content, str):
            raise self._unavailable(f"its answer is no chat completion: {raw[:200].decode('utf-8', 'replace')}")
        first = next((line.strip() for line in content.splitlines() if line.strip()), "")
        return "" if first.strip("\"'. ").casefold() in ("none", "") else first[:LABEL_CHARS]

    def _unavailable(self, why: str) -> LabelUnavailable:
        shown = printable(why.replace(self.key, "…") if self.key else why, 300)
        return LabelUnavailable(f"{printable(self.url)} gave no label: {shown}")


def prompt(texts: Sequence[str]) -> str:
    """What the model is asked."""
    rows = "\n".join(json.dumps(text, ensure_ascii=False) for text in texts)
    mark = hashlib.sha256(rows.encode("utf-8", "replace")).hexdigest()[:32]  # text cannot hold its own hash
    return Template(PROMPT.read_text(encoding="utf-8")).substitute(n=len(texts), mark=mark, rows=rows)
