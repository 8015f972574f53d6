"""Errors that a user can cause. There is one class per exit code, with subclasses per cause.

A `MolehuntError` is printed without a traceback: its message says what is wrong, where, and what to do next.
Any other exception is a fault of Molehunt and keeps its traceback.
"""

import re
from typing import ClassVar

OPTION = re.compile(r"\b([a-z_]+) \((--[a-z-]+)\)|(?<=\()([a-z_]+), (--[a-z-]+)(?=\))")
"""An argument with its option in a message, such as `fpr (--fpr)` or `(out, --out)`: the reader knows one of them."""


class MolehuntError(Exception):
    """Base class of all errors whose message is written for the user."""

    exit_code: ClassVar[int] = 2

    def __str__(self) -> str:
        """The message for callers from Python: of an argument with its option, only the argument is named."""
        return OPTION.sub(r"\1\3", super().__str__())

    @property
    def on_command_line(self) -> str:
        """The message for the command line: of an argument with its option, only the option is named."""
        return OPTION.sub(r"\2\4", super().__str__())


class UsageError(MolehuntError):
    """The request cannot be met; nothing was read or run."""

    exit_code: ClassVar[int] = 2


class NotTestable(MolehuntError):
    """The input is valid, but the question cannot be answered from it. This is never the same as "no finding"."""

    exit_code: ClassVar[int] = 3


class InvalidInput(MolehuntError):
    """A file or folder is broken or hostile, or of a type that is refused."""

    exit_code: ClassVar[int] = 4


class ShapeMismatch(InvalidInput):
    """Two matrices that should be compared have different shapes."""

    def __init__(self, name: str, base: tuple[int, ...], tuned: tuple[int, ...]) -> None:
        super().__init__(
            f"{printable(name)} is {list(base)} in the base and {list(tuned)} in the fine-tune: no difference "
            "exists.\nUsual cause: a resized vocabulary or the wrong base. Give the base that this model was "
            "fine-tuned from."
        )
        self._arguments = (name, base, tuned)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), self._arguments  # pickle would pass the message to __init__; workers send errors back


class CannotTap(NotTestable):
    """The model runs in a way that forward hooks cannot see: it is compiled, or its blocks are never called."""


def printable(text: str, limit: int = 120) -> str:
    """`text` made safe for one line of a terminal and cut, because names inside a checkpoint are untrusted."""
    safe = terminal_text(text[: limit + 1], kept="")  # every character yields one or more
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


def terminal_text(text: str, kept: str = "\n") -> str:
    """`text` as a terminal may show it: what would move, hide, reorder or recolour text is spelled out.

    That is every control character (ESC, BEL, C1), every format character (bidirectional marks, zero-width ones), half
    pairs of UTF-16, line separators, private and unassigned characters. Everything that Molehunt shows on a terminal
    goes through here.

    Args:
        text: text from anywhere.
        kept: characters that stay as they are in spite of this.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else _spelled(ord(c)) for c in text)


def json_text(text: str, *, ascii_only: bool = False) -> str:
    """JSON as a terminal may show it: the same value, with the characters of `terminal_text` as JSON escapes.

    Args:
        text: JSON. Outside of its strings it has no such character but line breaks, which stay.
        ascii_only: write every character that is not ASCII as an escape, for streams that can take no other.
    """
    if text.isascii() and "\x7f" not in text:
        return text
    return "".join(
        c if c == "\n" or (c.isprintable() and (c.isascii() or not ascii_only)) else _json_escape(ord(c)) for c in text
    )


def _spelled(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(code: int) -> str:
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\u{0xD800 + ((code - 0x10000) >> 10):04x}\\u{0xDC00 + ((code - 0x10000) & 0x3FF):04x}"
