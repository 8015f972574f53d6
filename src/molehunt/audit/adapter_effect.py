"""The change that an adapter of any kind makes to each weight, measured on the base that it is loaded onto.

A linear layer under an adapter is asked what it does to the unit vectors: that is its matrix, whatever made it. Other
layers are merged by PEFT on a copy. One layer is copied at a time; the base is in memory once.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from molehunt.audit.fused_experts import ExpertMatrix, LastParameter, expert_names, is_fused
from molehunt.audit.tensor_rows import RowMaker, given, start_row, tensor_row
from molehunt.checkpoint.loaded_view import LoadedView
from molehunt.direction.weight import frobenius_norm
from molehunt.errors import NotTestable, printable
from molehunt.model.adapter_placement import ADAPTER, wrapped_parameters
from molehunt.model.adapters import apply_adapter
from molehunt.model.blocks import module_role
from molehunt.model.loading import load_model

UNITS = 512
"""Number of unit vectors that a layer is given at a time."""
EPS = torch.finfo(torch.float32).eps
SAME = 1e-4
"""Greatest difference, as a share of the output, between a layer and the weights that it is said to have."""


def effect_rows(base: LoadedView, folder: Path) -> dict[str, dict[str, RowMaker]]:
    """Parameter → its rows, for every parameter that the adapter in `folder` can change.

    Raises as `apply_adapter`.
    """
    model = apply_adapter(load_model(base.checkpoint.path, torch.device("cpu"), torch.float32), folder)
    effect = MeasuredEffect(model)
    found = {name: _rows(base, effect, name) for name in effect.parameters()}
    for name, why in effect.foreign().items():
        found[name] = {name: partial(given, replace(start_row(name, None), status="changed", why=why))}
    return found


def _rows(base: LoadedView, effect: "MeasuredEffect", name: str) -> dict[str, RowMaker]:
    ours = base.tied.get(name, name)
    if ours not in base.names():
        why = "the base has no such tensor; the adapter adds one"
        return {name: partial(given, replace(start_row(name, None), status="changed", why=why))}
    kind, shape = base.checkpoint.model_type, base.shape(ours)
    exact = AsComputed(base, module_role(name, kind) is not None)
    if is_fused(name, shape):
        role, last = module_role(name, kind), (LastParameter(), LastParameter())
        return {
            one: partial(
                tensor_row,
                ExpertMatrix(exact, ours, n, last[0]),
                ExpertMatrix(effect, name, n, last[1]),
                one,
                one,
                role,
            )
            for n, one in enumerate(expert_names(name, shape[0]))
        }
    alone = ours == name and base.group(name).renamed
    shown = base.sources(name)[0] if alone else name
    return {shown: partial(tensor_row, exact, effect, ours, name, module_role(shown, kind), shown=shown)}


@dataclass(frozen=True, eq=False)
class AsComputed:
    """The base's parameters as the float32 in which the effect is measured: only that arithmetic rounds here."""

    view: LoadedView
    matrix: bool
    """Whether this is a matrix of a block, whose change has a floor."""

    def shape(self, name: str) -> tuple[int, ...]:
        return self.view.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def rounding(self, name: str) -> float:
        """Norm of the error when PEFT rounds a factor of each row to float32, as the magnitudes of DoRA are."""
        return EPS * frobenius_norm(self.tensor(name)) if self.matrix else 0.0

    def tensor(self, name: str) -> Tensor:
        """The parameter in float32. Raises as `LoadedView.tensor`."""
        return self.view.tensor(name).float()


@dataclass(eq=False)
class MeasuredEffect:
    """The parameters of a base as an adapter leaves them, one layer at a time."""

    model: nn.Module
    """A PEFT model in float32."""
    _layers: dict[str, nn.Module] = field(init=False, repr=False)
    """Module of the base → the outermost layer that acts in its place."""
    _replaced: dict[str, Tensor] = field(init=False, repr=False)
    _shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False)
    _last: tuple[str, dict[str, Tensor]] = field(default=("", {}), init=False, repr=False)

    def __post_init__(self) -> None:
        self._layers, self._replaced, self._shapes = {}, {}, {}
        _find_layers(cast("Any", self.model).base_model.model, "", self._layers)
        for one in wrapped_parameters(self.model):
            if one.plain is None:
                continue
            self._shapes[one.plain] = tuple(one.parameter.shape)
            if self._layer_of(one.plain) is None:  # what the adapter adds comes last and wins
                self._replaced[one.plain] = one.parameter.detach()

    def parameters(self) -> list[str]:
        """Names of the base's parameters inside layers that the adapter acts on, or that it may have replaced."""
        inside = [one.plain for one in wrapped_parameters(self.model) if one.plain and self._layer_of(one.plain)]
        return list(dict.fromkeys([*inside, *self._replaced]))

    def foreign(self) -> dict[str, str]:
        """What acts in the model besides the base's parameters: a bias where there was none → what is said of it."""
        found: dict[str, str] = {}
        for path, layer in self._layers.items():
            if isinstance(_inner(layer), nn.Linear) and cast("Any", _inner(layer)).bias is None:
                try:
                    bias = self._measured(path).get("bias")
                except NotTestable:
                    continue  # its weight says why
                if bias is not None:
                    found[f"{path}.bias"] = f"a bias that the base does not have, of norm {float(bias.norm()):.3g}"
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def rounding(self, name: str) -> float:
        return 0.0

    def tensor(self, name: str) -> Tensor:
        """A parameter as the adapter leaves it. Raises NotTestable when its layer does no more act as weights do."""
        path = self._layer_of(name)
        if path is None:
            return self._replaced[name].float()
        return self._measured(path)[name.removeprefix(f"{path}.")]

    def _layer_of(self, parameter: str) -> str | None:
        parts = parameter.split(".")
        return next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in self._layers), None)

    def _measured(self, path: str) -> dict[str, Tensor]:
        if self._last[0] != path:
            self._last = "", {}  # two would double the memory
            self._last = path, _measure(self._layers[path])
        return self._last[1]


def _find_layers(module: nn.Module, path: str, found: dict[str, nn.Module]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, child in module.named_children():
        inside = f"{path}{name}"
        if isinstance(child, BaseTunerLayer):
            found[inside] = child
        elif isinstance(child, AuxiliaryTrainingWrapper):
            tuner = next((one for one in child.children() if isinstance(one, BaseTunerLayer)), None)
            if tuner is not None:  # trained tokens
                found[inside] = tuner
        else:
            _find_layers(child, f"{inside}.", found)


def _inner(layer: nn.Module) -> nn.Module:
    return cast("nn.Module", cast("Any", layer).get_base_layer())


@torch.no_grad()
def _measure(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters of the base's module as the layer makes them, by their names in the module."""
    from transformers.pytorch_utils import Conv1D

    layer = copy.deepcopy(layer).eval()
    if isinstance(_inner(layer), nn.Linear | Conv1D):
        return _probed(layer, transposed=isinstance(_inner(layer), Conv1D))
    return _merged(layer)


def _probed(layer: nn.Module, *, transposed: bool) -> dict[str, Tensor]:
    """Matrix and bias of the affine map that a layer is."""
    layer = layer.double()  # so that nothing but the weights themselves was rounded
    weight = cast("Any", _inner(layer)).weight
    d_in = weight.shape[0] if transposed else weight.shape[1]
    bias = layer(torch.zeros(1, d_in, dtype=torch.float64))[0]
    matrix = torch.cat([(layer(rows) - bias).float() for rows in _unit_vectors(d_in)])  # [d_in d_out]
    sizes = torch.tensor([[0.1], [1.0], [10.0]])
    x = (torch.randn(3, d_in, generator=torch.Generator().manual_seed(0)) * sizes).double()
    wanted, got = layer(x), x @ matrix.double() + bias
    if float((wanted - got).norm()) > SAME * float(wanted.norm()):
        raise NotTestable("what the adapter does here depends on the input: it is no change of a weight.")
    found = {"weight": (matrix if transposed else matrix.mT).contiguous()}
    if cast("Any", _inner(layer)).bias is not None or bool(bias.count_nonzero()):
        found["bias"] = bias.float()
    return found


def _unit_vectors(n: int) -> Iterator[Tensor]:
    """The rows of the unit matrix, some at a time."""
    for start in range(0, n, UNITS):
        rows = torch.zeros(min(UNITS, n - start), n, dtype=torch.float64)
        rows[:, start:].fill_diagonal_(1.0)
        yield rows


def _merged(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters of the base's module after PEFT merged what acts on it, from the inside outwards."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuners = [one for one in layer.modules() if isinstance(one, BaseTunerLayer)]
    try:
        for tuner in reversed(tuners):
            cast("Any", tuner).merge(adapter_names=[ADAPTER])
    except Exception as error:  # each kind of adapter refuses in its own way
        raise NotTestable(f"PEFT cannot merge this: {printable(str(error), 200)}") from error
    return {name: parameter.detach() for name, parameter in _inner(layer).named_parameters()}
