"""Whether two models have the same parameters, so that one can be the fine-tune of the other."""

from typing import Any, cast

from torch import nn

from molehunt.errors import NotTestable, ShapeMismatch, printable
from molehunt.model.adapters import base_parameters
from molehunt.model.blocks import unwrapped


def check_same_parameters(base: nn.Module, tuned: nn.Module) -> None:
    """Check that both models have parameters of the same names and shapes, their numbers of token ids aside.

    Raises:
        ShapeMismatch: a parameter differs in shape.
        NotTestable: only one of the two has a parameter, so they are not of one architecture.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in base_parameters(base).items()}
    tuned_shapes = {name: tuple(parameter.shape) for name, parameter in base_parameters(tuned).items()}
    by_token = _by_token(base)
    for name, shape in shapes.items():
        skipped = 1 if name in by_token else 0  # rows of a resized vocabulary are compared as far as both have them
        if tuned_shapes.get(name, shape)[skipped:] != shape[skipped:]:
            raise ShapeMismatch(name, shape, tuned_shapes[name])
    odd = sorted(shapes.keys() ^ tuned_shapes.keys())
    if odd:
        where = "base" if odd[0] in shapes else "fine-tune"
        raise NotTestable(
            f"only the {where} has {printable(odd[0])}: the two are not of one architecture.\n"
            "Give the base that this model was fine-tuned from."
        )


def _by_token(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that have a row for each token id: the embedding, and the head with its bias."""
    inner = cast("Any", unwrapped(model))
    layers = (inner.get_input_embeddings(), inner.get_output_embeddings())
    rows = {id(getattr(layer, name, None)) for layer in layers for name in ("weight", "bias")} - {id(None)}
    return frozenset(name for name, parameter in base_parameters(model).items() if id(parameter) in rows)
