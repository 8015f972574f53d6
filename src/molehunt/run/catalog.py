"""Finds a class by its name: in a literal table, or among the entry points of plugins. Nothing is imported early."""

import difflib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from molehunt.errors import UsageError, printable


def names(catalog: Mapping[str, str], group: str) -> tuple[str, ...]:
    """Every name that `load` knows, sorted. No method is imported."""
    return tuple(sorted({*catalog, *_plugins(group)}))


def load(catalog: Mapping[str, str], name: str, group: str) -> object:
    """The class or function behind `name`.

    Args:
        catalog: rows such as `"mean-difference": "molehunt.detect.mean_difference:MeanDifference"`.
        name: a key of the catalogue, or the name of a plugin's entry point.
        group: the entry-point group of plugins, such as `"molehunt.detectors"`.

    Raises:
        UsageError: no method has the name, or one of Molehunt and one of a plugin have it.
    """
    plugins = _plugins(group)
    if name in catalog and name in plugins:
        raise UsageError(
            f"{printable(name)} is offered by Molehunt and by the plugin {plugins[name].value} ({group}).\n"
            "Rename the plugin's entry point: a result must say which of the two made it."
        )
    if name in plugins:
        try:
            return plugins[name].load()
        except Exception as error:  # a plugin's code can raise anything while it is imported
            raise UsageError(
                f"The plugin {printable(name)} ({group}) cannot be imported: {type(error).__name__}: "
                f"{printable(str(error), 200)}\nMend or uninstall the package that offers {plugins[name].value}."
            ) from error
    if name not in catalog:
        known = names(catalog, group)
        close = difflib.get_close_matches(name, known, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise UsageError(f"There is no {printable(name)!r} here.{meant}\nAvailable: {', '.join(known) or 'nothing'}.")
    module, _, attribute = catalog[name].partition(":")
    return getattr(import_module(module), attribute)


def installed(group: str) -> dict[str, str]:
    """Name → code and version of each plugin: part of a unit's address where plugins can change its result."""
    return {name: f"{point.value} {_release(point)}".rstrip() for name, point in sorted(_plugins(group).items())}


def _release(point: EntryPoint) -> str:
    return "" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _plugins(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
