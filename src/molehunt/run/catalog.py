"""From a name to a class: a literal table, joined by plugins' entry points. Nothing is imported early."""

import difflib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from molehunt.errors import UsageError, printable


def names(catalog: Mapping[str, str], group: str) -> tuple[str, ...]:
    """Every name that `load` knows, sorted. Imports no method."""
    return tuple(sorted({*catalog, *_plugins(group)}))


def load(catalog: Mapping[str, str], name: str, group: str) -> object:
    """The class or function behind `name`.

    Args:
        catalog: rows such as `"mean-difference": "molehunt.detect.mean_difference:MeanDifference"`.
        name: a row of the catalogue, or what a plugin calls its own.
        group: the entry-point group of plugins, such as `"molehunt.detectors"`.

    Raises:
        UsageError: nobody offers the name, or a plugin and we both do.
    """
    plugins = _plugins(group)
    if name in catalog and name in plugins:
        raise UsageError(
            f"{printable(name)} is offered by Molehunt and by the plugin {plugins[name].value} ({group}).\n"
            "Rename the plugin's entry point: a result must say which of the two made it."
        )
    if name in plugins:
        return plugins[name].load()
    if name not in catalog:
        known = names(catalog, group)
        close = difflib.get_close_matches(name, known, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise UsageError(f"There is no {printable(name)!r} here.{meant}\nAvailable: {', '.join(known) or 'nothing'}.")
    module, _, attribute = catalog[name].partition(":")
    return getattr(import_module(module), attribute)


def _plugins(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
