"""Everything that can go wrong by somebody's hand. One class per exit code, subclasses per cause.

A `MolehuntError` is printed without a traceback: its message says what is wrong, where, and what to do next.
Anything else that is raised is our fault and keeps its traceback.
"""

from typing import ClassVar


class MolehuntError(Exception):
    """Base of every error whose message is written for the person at the terminal."""

    exit_code: ClassVar[int] = 2


class UsageError(MolehuntError):
    """The command was asked for something it cannot do; nothing was read or run."""

    exit_code: ClassVar[int] = 2


class NotTestable(MolehuntError):
    """The input is fine, and the question cannot be answered from it. Never the same as "no finding"."""

    exit_code: ClassVar[int] = 3


class InvalidInput(MolehuntError):
    """A file or folder is broken, hostile or of a kind that is refused."""

    exit_code: ClassVar[int] = 4


class ShapeMismatch(InvalidInput):
    """Two matrices that should be compared have different shapes."""

    def __init__(self, name: str, base: tuple[int, ...], tuned: tuple[int, ...]) -> None:
        super().__init__(
            f"{printable(name)} is {list(base)} in the base and {list(tuned)} in the fine-tune: no difference "
            "exists.\nUsual cause: a resized vocabulary or the wrong base. Give the base that this model was "
            "fine-tuned from."
        )
        self._told = (name, base, tuned)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), self._told  # pickle would give __init__ the message: workers send errors home


class CannotTap(NotTestable):
    """The model runs in a way that forward hooks cannot see (compiled, or its blocks are never called)."""


def printable(text: str, limit: int = 120) -> str:
    """`text` made safe for a terminal: names inside a checkpoint are written by strangers."""
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"
