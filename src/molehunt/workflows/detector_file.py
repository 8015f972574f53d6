"""A fitted detector as JSON values and tensors, and back."""

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from molehunt.contracts import Detector
from molehunt.detect.recipe import detector_class
from molehunt.errors import UsageError, printable
from molehunt.model.pair import ModelPair
from molehunt.site import Site
from molehunt.workflows.models import open_pair


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


def models_of(pair: ModelPair) -> dict[str, Any]:
    """What a saved detector says of its models. The hash is that of the fine-tune's files; None for models in memory."""
    return {"model": open_pair(pair)[1], "n_layers": pair.n_layers, "d_model": pair.d_model}


def refuse_other_models(stored: dict[str, Any], given: dict[str, Any], name: str) -> None:
    """Raises UsageError unless a detector was fitted on these models; hashes are compared where both are known."""
    shape, other = ((one["n_layers"], one["d_model"]) for one in (stored, given))
    if shape != other:
        raise UsageError(
            f"{printable(name)} is for a model of {shape[0]} blocks of width {shape[1]}; the given one has {other[0]} of "
            f"{other[1]}."
        )
    if None not in (stored["model"], given["model"]) and stored["model"] != given["model"]:
        raise UsageError(
            f"{printable(name)} was fitted on another fine-tune ({printable(str(stored['model']), 13)} instead of "
            f"{printable(given['model'], 13)}): its scores and its threshold do not hold here. Fit it again."
        )
