"""Files that Molehunt saved and somebody else may have changed: whatever is wrong with one is InvalidInput, by name."""

import contextlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from molehunt.errors import InvalidInput, MolehuntError, printable

T = TypeVar("T")
TEXT = (str, type(None))
"""Types of a text that may be missing, for `of_types`."""
WRONG = (
    SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError,
    MemoryError, AssertionError,
)  # fmt: skip
"""What reading a file and building an object from it may raise. RuntimeError includes RecursionError and torch's."""


@contextlib.contextmanager
def reading(path: Path, what: str, advice: str = "") -> Generator[None, None, None]:
    """Inside the block, `path` is read as `what`, such as "steering vector of Molehunt's".

    Args:
        path: the file. A pipe or a device is refused: reading it would wait for ever.
        what: a noun, which follows `is no`.
        advice: a sentence that says what to do.

    Raises:
        InvalidInput: anything went wrong in the block, or `path` is no file.
    """
    if path.exists() and not path.is_file():
        raise InvalidInput(f"{printable(path.name)} is no {what}: it is not a file.{_next(advice)}")
    try:
        yield
    except (*WRONG, MolehuntError) as error:
        why = printable(" ".join(str(error).split()) or type(error).__name__, 200)
        raise InvalidInput(f"{printable(path.name)} is no {what}: {why}{_next(advice, why)}") from None


def header_and_tensors(path: Path, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON object under `key` of a safetensors file's metadata, and all tensors. Call it inside `reading`."""
    with safe_open(path, "pt") as file:
        header = json.loads((file.metadata() or {})[key])
        if not isinstance(header, dict):
            raise ValueError(f"its field {key} is no object")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {str(name): value for name, value in header.items()}, tensors


def of_types(made: T, **types: type | tuple[type, ...]) -> T:
    """`made`, whose fields are of these types: a dataclass takes any. Raises TypeError where one is not."""
    for name, wanted in types.items():
        value: object = getattr(made, name)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}")
    return made


def _next(advice: str, before: str = ".") -> str:
    end = "" if before.endswith((".", "!", "?")) else "."
    return f"{end}\n{advice}" if advice else ""
