"""A fitted detector as JSON values and tensors, and back."""

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from molehunt.contracts import Detector
from molehunt.detect.recipe import detector_class
from molehunt.errors import UsageError
from molehunt.site import Site


def detector_parts(detector: Detector) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A detector's fields as JSON values and tensors.

    Raises:
        UsageError: a field has a file of its own, such as a dictionary.
    """
    if not is_dataclass(detector):
        raise UsageError(f"{detector.name} is no dataclass, so its fields are not known; fit it again.")
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for one in fields(detector):
        value = getattr(detector, one.name)
        if isinstance(value, Tensor):
            tensors[one.name] = value.detach().cpu().contiguous()
        elif isinstance(value, Site):
            values[one.name] = {"site": str(value)}
        elif isinstance(value, str | int | float | bool):
            values[one.name] = value
        else:
            raise UsageError(
                f"{detector.name} reads a {type(value).__name__}, which has files of its own; fit it again."
            )
    return values, tensors


def rebuilt_detector(key: str, values: dict[str, Any], tensors: dict[str, Tensor]) -> Detector:
    """The detector of the recipe with this key, from its saved fields. Raises UsageError where nobody offers the recipe."""
    given = {name: Site.parse(value["site"]) if isinstance(value, dict) else value for name, value in values.items()}
    made = detector_class(key)(**given, **tensors)
    if not isinstance(made, Detector):
        raise UsageError(f"{key} does not lead to a detector")
    return made
