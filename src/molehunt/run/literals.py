"""Arguments that take one of a few values: a value that is none of them is refused by name, with the values."""

import inspect
from collections.abc import Callable
from functools import cache, wraps
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from molehunt.errors import UsageError, printable

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function that refuses a value which a `Literal` annotation of its arguments does not list.

    Type checkers see such a mistake, and a notebook has none: `method="mean"` must not silently mean something else.

    Raises:
        UsageError: at the call, with the argument and the values that it takes.

    Example:
        >>> @checked
        ... def paint(colour: Literal["red", "blue"]) -> str:
        ...     return colour
        >>> paint("green")
        Traceback (most recent call last):
        molehunt.errors.UsageError: colour takes 'red' or 'blue', got 'green'.
    """
    signature = inspect.signature(function)

    @cache
    def values() -> dict[str, tuple[Any, ...]]:  # annotations are resolved at the first call: modules are complete then
        found = {name: _literals(hint) for name, hint in get_type_hints(function).items()}
        return {name: allowed for name, allowed in found.items() if allowed}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # Python's own message names the function
        for name, allowed in values().items():
            if name in given and isinstance(given[name], str) and given[name] not in allowed:
                listed = [repr(one) for one in allowed if one is not None]
                choices = f"{', '.join(listed[:-1])} or {listed[-1]}" if len(listed) > 1 else listed[0]
                raise UsageError(f"{name} takes {choices}, got {printable(repr(given[name]), 60)}.")
        return function(*args, **kwargs)

    return call


def _literals(hint: Any) -> tuple[Any, ...]:
    """The strings of a Literal, alone or beside None; none where any other text may be given, too."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        parts = [part for part in get_args(hint) if part is not type(None)]
        if parts and all(get_origin(part) is Literal for part in parts):
            return tuple(value for part in parts for value in get_args(part))
    return ()
