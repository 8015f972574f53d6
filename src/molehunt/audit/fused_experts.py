"""The matrices of single experts inside a parameter that holds them all, so that each is compared as a matrix."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from molehunt.audit.tensor_rows import TensorSource
from molehunt.model.blocks import FUSED_EXPERTS


def is_fused(parameter: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter holds one matrix for each expert: [expert out in], or [expert in out]."""
    return len(shape) == 3 and FUSED_EXPERTS.fullmatch(parameter) is not None


def expert_names(parameter: str, experts: int) -> list[str]:
    """Names of single experts' matrices: `mlp.experts.down_proj` gives `mlp.experts.0.down_proj` and so on."""
    found = FUSED_EXPERTS.fullmatch(parameter)
    if found is None:
        raise ValueError(f"{parameter} holds no experts")
    return [f"{found['before']}.{number}.{found['leaf']}{found['end']}" for number in range(experts)]


@dataclass(eq=False)
class LastParameter:
    """The parameter of one side that was read last: its experts are read one after the other."""

    name: str = ""
    value: Tensor | None = field(default=None, repr=False)

    def read(self, view: TensorSource, name: str) -> Tensor:
        """The values of a parameter. Raises as the source's `tensor`."""
        if self.value is None or self.name != name:
            self.value = None  # two would double the memory of a comparison
            self.name, self.value = name, view.tensor(name)
        return self.value


@dataclass(frozen=True, eq=False)
class ExpertMatrix:
    """The matrix of one expert as a source of tensors; its shape is [out in], or [in out] as in the parameter."""

    view: TensorSource
    parameter: str
    number: int
    last: LastParameter

    def shape(self, name: str) -> tuple[int, ...]:
        return self.view.shape(self.parameter)[1:]

    def dtype(self, name: str) -> torch.dtype:
        return self.view.dtype(self.parameter)

    def rounding(self, name: str) -> float:
        return self.view.rounding(self.parameter)

    def tensor(self, name: str) -> Tensor:
        """A copy of the matrix. Raises as the source's `tensor`."""
        return self.last.read(self.view, self.parameter)[self.number].clone()
