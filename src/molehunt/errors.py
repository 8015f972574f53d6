"""Errors that a user can cause. There is one class per exit code, with subclasses per cause.

A `MolehuntError` is printed without a traceback: its message says what is wrong, where, and what to do next.
Any other exception is a fault of Molehunt and keeps its traceback.
"""

from typing import ClassVar


class MolehuntError(Exception):
    """Base class of all errors whose message is written for the user."""

    exit_code: ClassVar[int] = 2


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
    """`text` made safe for a terminal, because names inside a checkpoint are untrusted."""
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"
