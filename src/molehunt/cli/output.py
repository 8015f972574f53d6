"""What reaches the terminal: results on stdout, messages on stderr, all of it through `terminal_text`.

Commands call `show`, `show_json` and `complain`. Libraries print and log on their own, so `safe_streams` also puts a
stream that escapes in the place of stdout and stderr while a command runs.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Generator
from typing import Any, TextIO, cast

from molehunt.errors import json_text, terminal_text

MOVES = re.compile(r"(?:\r|\n|\x1b\[A)*")
"""A whole write of a progress bar that only moves the cursor."""


def show(text: str) -> None:
    """Print one result on stdout. Raises OSError where stdout cannot be written."""
    sys.stdout.write(terminal_text(text) + "\n")
    sys.stdout.flush()


def show_json(value: object, *, indent: int | None = 2) -> None:
    """Print a value as JSON on stdout, or JSON that is text already. Raises OSError where stdout cannot be written."""
    text = value if isinstance(value, str) else json.dumps(value, indent=indent, ensure_ascii=False)
    takes_all = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")
    sys.stdout.write(json_text(text.rstrip("\n"), ascii_only=not takes_all) + "\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """Print a message on stderr while no progress bar is drawn; nothing happens where stderr cannot be written."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(terminal_text(text) + "\n")
        sys.stderr.flush()


class SafeStream:
    """A text stream whose writes go through `terminal_text`, and through what the encoding of the stream can take."""

    def __init__(self, stream: Any, *, lossy: bool = False) -> None:
        self.stream = stream
        self._lossy = lossy
        """Whether a write that fails is dropped: a full disk under a log of messages must not end the work."""

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # libraries probe for bytes
            raise TypeError(f"text is written here, not {type(text).__name__}")
        if not MOVES.fullmatch(text):
            start = "\r" if text.startswith("\r") else ""  # a progress bar draws its line anew
            text = start + terminal_text(text[len(start) :], kept="\n\t")
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        try:
            self.stream.write(text)
        except BrokenPipeError:
            raise
        except OSError:
            if not self._lossy:
                raise
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            raise
        except OSError:
            if not self._lossy:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def unwrapped(stream: Any) -> Any:
    """The stream below a `SafeStream`: what draws a progress bar needs its escape sequences."""
    while isinstance(stream, SafeStream):
        stream = stream.stream
    return stream


def wrap_streams() -> None:
    """Put a `SafeStream` in the place of stdout and of stderr, unless one is there."""
    if not isinstance(sys.stdout, SafeStream):
        sys.stdout = cast(TextIO, SafeStream(sys.stdout))
    if not isinstance(sys.stderr, SafeStream):
        sys.stderr = cast(TextIO, SafeStream(sys.stderr, lossy=True))


@contextlib.contextmanager
def safe_streams() -> Generator[None, None, None]:
    """Inside the block, everything that Python code prints is escaped, and all three standard streams are open."""
    _open_missing()
    before = sys.stdout, sys.stderr
    wrap_streams()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _open_missing() -> None:
    """Open the null device for a standard stream that was closed by whoever started this program.

    Otherwise the next file that is opened would take its number, and a library's message would be written into it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue  # open, but not Python's
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
