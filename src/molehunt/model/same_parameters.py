"""Whether two models have the same parameters, so that one can be the fine-tune of the other."""

from collections.abc import Iterator

from torch import nn

from molehunt.errors import NotTestable, ShapeMismatch, printable
from molehunt.model.blocks import unwrapped


def check_same_parameters(base: nn.Module, tuned: nn.Module) -> None:
    """Check that both models have parameters of the same names and shapes.

    Raises:
        ShapeMismatch: a parameter differs in shape.
        NotTestable: only one of the two has a parameter, so they are not of one architecture.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in _plain_parameters(base)}
    tuned_shapes = {name: tuple(parameter.shape) for name, parameter in _plain_parameters(tuned)}
    for name, shape in shapes.items():
        if tuned_shapes.get(name, shape) != shape:
            raise ShapeMismatch(name, shape, tuned_shapes[name])
    odd = sorted(shapes.keys() ^ tuned_shapes.keys())
    if odd:
        where = "base" if odd[0] in shapes else "fine-tune"
        raise NotTestable(
            f"only the {where} has {printable(odd[0])}: the two are not of one architecture.\n"
            "Give the base that this model was fine-tuned from."
        )


def _plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by their names outside PEFT; what an adapter adds is left out."""
    inner = unwrapped(model)
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        if ".lora_" not in name and ".modules_to_save." not in name:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter
