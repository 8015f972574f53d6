"""Checks of what callers of a model pair give it, with the way to write what was meant."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.site import Site

T = TypeVar("T")
R = TypeVar("R")


def by_row(ids: Callable[[T], R], texts: Sequence[T]) -> list[R]:
    """What is made of every text. Raises InvalidInput with the number of the row, from 1."""
    found: list[R] = []
    for number, text in enumerate(texts, 1):
        try:
            found.append(ids(text))
        except InvalidInput as error:
            raise InvalidInput(f"row {number}: {error}") from error
    return found


def refuse_no_sites(sites: object) -> None:
    """Raises UsageError unless this is a list of sites, with the way to write what was meant."""
    if isinstance(sites, Site):
        raise UsageError(f"sites is a list: give [Site({sites.layer}, {sites.stream!r})].")
    wrong = (
        sites
        if isinstance(sites, str)
        else next((one for one in cast("Any", sites) if not isinstance(one, Site)), None)
    )
    if wrong is not None:
        given = printable(repr(wrong), 40)
        made = f"Site.parse({given})" if isinstance(wrong, str) else f"Site({given})"
        raise UsageError(
            f"sites holds {given}, which is no Site: give [{made}], such as [Site(3)] or [Site.parse('L3.resid')]."
        )


def refuse_one_string(*lists: object) -> None:
    """A string is a sequence of characters, too, and each would be taken for a prompt."""
    if any(isinstance(texts, str) for texts in lists):
        raise UsageError("give a list of texts, such as ['What is 2 plus 2?'], and not one string.")
