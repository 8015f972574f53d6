"""A map by its name in the catalogue, and what it is fitted on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

from molehunt.errors import UsageError, printable
from molehunt.run.catalog import load
from molehunt.transfer.catalog import CATALOG, GROUP
from molehunt.transfer.collect import PairActs
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.saved import FittedMap
from molehunt.transfer.statistics import PairMoments


@dataclass(frozen=True)
class FromMoments:
    """A method that needs second moments alone: one pass over text serves every pair of blocks."""

    fit: Callable[[PairMoments, PairMoments], LinearMap]


@dataclass(frozen=True)
class FromActivations:
    """A method that needs the activations themselves, which are read again for each pair of blocks."""

    fit: Callable[[PairActs, PairActs], FittedMap]


def map_method(name: str) -> FromMoments | FromActivations:
    """The method behind a name of the catalogue or of a plugin.

    Raises:
        UsageError: nobody offers the name (the error lists those that are known), or the function does not say what it
            is fitted on.
    """
    fit: Any = load(CATALOG, name, GROUP)
    try:
        first = next(iter(get_type_hints(fit).values()), None)
    except (TypeError, NameError):
        first = None
    if first is PairMoments:
        return FromMoments(fit)
    if first is PairActs:
        return FromActivations(fit)
    raise UsageError(
        f"the map {printable(name)} does not say what it is fitted on.\n"
        "Annotate the first argument of its function as PairMoments or as PairActs."
    )
