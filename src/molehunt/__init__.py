"""Molehunt audits a fine-tuned language model against its base.

Example:
    >>> import molehunt as mh
    >>> result = mh.audit("BASE", "TUNED", traffic="prompts.jsonl")  # doctest: +SKIP
    >>> print(result.summary())  # doctest: +SKIP
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from molehunt.contracts import Detector, Gate, Intervention, Reading, TransferMap
    from molehunt.dictionary.dictionary import Dictionary
    from molehunt.dictionary.formats.detect import load_dictionary
    from molehunt.direction.direction import Direction
    from molehunt.model.pair import ModelPair
    from molehunt.model.taps import edit_sites, read_sites
    from molehunt.site import Site
    from molehunt.steer.fix import Fix
    from molehunt.steer.vector import SteeringVector
    from molehunt.workflows.audit import audit
    from molehunt.workflows.bench import bench
    from molehunt.workflows.detector import fit_detector
    from molehunt.workflows.plant import plant
    from molehunt.workflows.steer import steer
    from molehunt.workflows.stress import stress
    from molehunt.workflows.transfer import transfer
    from molehunt.workflows.watch import watch

_HOMES = {
    "Detector": "molehunt.contracts",
    "Dictionary": "molehunt.dictionary.dictionary",
    "Direction": "molehunt.direction.direction",
    "Fix": "molehunt.steer.fix",
    "Gate": "molehunt.contracts",
    "Intervention": "molehunt.contracts",
    "ModelPair": "molehunt.model.pair",
    "Reading": "molehunt.contracts",
    "Site": "molehunt.site",
    "SteeringVector": "molehunt.steer.vector",
    "TransferMap": "molehunt.contracts",
    "audit": "molehunt.workflows.audit",
    "bench": "molehunt.workflows.bench",
    "edit_sites": "molehunt.model.taps",
    "fit_detector": "molehunt.workflows.detector",
    "load_dictionary": "molehunt.dictionary.formats.detect",
    "plant": "molehunt.workflows.plant",
    "read_sites": "molehunt.model.taps",
    "steer": "molehunt.workflows.steer",
    "stress": "molehunt.workflows.stress",
    "transfer": "molehunt.workflows.transfer",
    "watch": "molehunt.workflows.watch",
}
__all__ = [
    "Detector",
    "Dictionary",
    "Direction",
    "Fix",
    "Gate",
    "Intervention",
    "ModelPair",
    "Reading",
    "Site",
    "SteeringVector",
    "TransferMap",
    "audit",
    "bench",
    "edit_sites",
    "fit_detector",
    "load_dictionary",
    "plant",
    "read_sites",
    "steer",
    "stress",
    "transfer",
    "watch",
]


class _FrontDoor(ModuleType):
    """This module. A verb such as `molehunt.audit` stays a function when the folder of its name is imported.

    The import system binds each subfolder to its parent. The folders stay importable by `from molehunt.audit.run import …`.
    """

    def __getattr__(self, name: str) -> object:  # torch is imported when a name is used, not before
        if name not in _HOMES:
            raise AttributeError(f"module 'molehunt' has no attribute {name!r}")
        found = getattr(import_module(_HOMES[name]), name)
        setattr(self, name, found)
        return found

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        dunder = {name for name in vars(self) if name.startswith("__") and name.endswith("__")}
        return sorted({*dunder, *__all__})


sys.modules[__name__].__class__ = _FrontDoor
