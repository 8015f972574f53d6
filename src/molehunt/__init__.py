"""Molehunt audits a fine-tuned language model against its base."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from molehunt.contracts import Detector, Gate, Intervention, Reading, TransferMap
    from molehunt.direction.direction import Direction
    from molehunt.model.pair import ModelPair
    from molehunt.model.taps import edit_sites, read_sites
    from molehunt.site import Site

_HOMES = {
    "Detector": "molehunt.contracts",
    "Direction": "molehunt.direction.direction",
    "Gate": "molehunt.contracts",
    "Intervention": "molehunt.contracts",
    "ModelPair": "molehunt.model.pair",
    "Reading": "molehunt.contracts",
    "Site": "molehunt.site",
    "TransferMap": "molehunt.contracts",
    "edit_sites": "molehunt.model.taps",
    "read_sites": "molehunt.model.taps",
}
__all__ = [
    "Detector",
    "Direction",
    "Gate",
    "Intervention",
    "ModelPair",
    "Reading",
    "Site",
    "TransferMap",
    "edit_sites",
    "read_sites",
]


def __getattr__(name: str) -> object:  # torch is imported when a name is used, not before
    if name not in _HOMES:
        raise AttributeError(f"module 'molehunt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
