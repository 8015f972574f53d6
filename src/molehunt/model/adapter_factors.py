"""The change that a plain LoRA adapter makes to each matrix, as two factors: nothing is loaded or merged.

PEFT itself finds the modules, ranks and scales, on a model without weights.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from molehunt.checkpoint.adapter_folder import PREFIX
from molehunt.model.adapter_placement import (
    ADAPTER,
    adapter_config,
    check_injection,
    placed_tensors,
    with_adapter,
    wrapped_parameters,
)


class Factors(NamedTuple):
    """The change of one matrix, `scale * B @ A`."""

    parameter: str
    """Name of the matrix in the base model, such as `model.layers.0.mlp.down_proj.weight`."""
    b: Tensor
    """Matrix B, of shape [d_out r]. Of an embedding, whose rows are tokens, [vocab r]."""
    a: Tensor
    """Matrix A, of shape [r d_in]."""
    scale: float


@dataclass(frozen=True, eq=False, kw_only=True)
class LoraChange:
    """Everything that a plain LoRA adapter changes, by names of the base's parameters."""

    factors: tuple[Factors, ...]
    replaced: Mapping[str, Tensor]
    """Parameter → the tensor that takes its place: modules_to_save, trained biases, saved embeddings."""
    added: Mapping[str, Tensor]
    """Bias → what `lora_bias` adds to it; the base may have no such bias."""


def lora_change(skeleton: nn.Module, folder: Path) -> LoraChange | None:
    """The change that the adapter in `folder` makes to a base, or None when it is not plain LoRA on this base.

    Args:
        skeleton: the base without weights, on the meta device; it is copied.
        folder: the adapter's folder.

    Raises:
        InvalidInput: the adapter is not one of this base, or not all of it would be loaded.
        NotTestable: the adapter changes no weight, or is of a kind that nothing here knows.
    """
    check_injection(skeleton, folder)
    model = with_adapter(copy.deepcopy(skeleton), adapter_config(folder), folder)
    layers = _plain_layers(model)
    if layers is None:
        return None
    placed = placed_tensors(model, folder)
    factors: list[Factors] = []
    added: dict[str, Tensor] = {}
    for path, layer in layers.items():
        scale = float(layer.scaling[ADAPTER])
        name = path.removeprefix(PREFIX)
        if f"{path}.lora_embedding_A.{ADAPTER}" in placed:  # the embedding's rows are tokens: (B A)ᵀ = Aᵀ Bᵀ
            a, b = (placed[f"{path}.lora_embedding_{part}.{ADAPTER}"] for part in "AB")
            factors.append(Factors(f"{name}.weight", a.mT, b.mT, scale))
            continue
        a, b = (placed[f"{path}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
        factors.append(Factors(f"{name}.weight", b, a, scale))
        bias = placed.get(f"{path}.lora_B.{ADAPTER}.bias")
        if bias is not None:
            added[f"{name}.bias"] = scale * bias.float()
    replaced = _replaced(model, placed)
    if any(one.parameter in replaced for one in factors):
        return None  # a saved embedding under an adapter of its own
    return LoraChange(factors=tuple(factors), replaced=replaced, added=added)


def _replaced(model: nn.Module, placed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter of the base → the tensor of the adapter that is loaded into it, or that stands in its place.

    What is loaded into a tied tensor changes all that share it.
    """
    places = wrapped_parameters(model)
    loaded = {id(one.parameter): placed[one.path] for one in places if one.path in placed}
    return {one.plain: loaded[id(one.parameter)] for one in places if one.plain and id(one.parameter) in loaded}


def _plain_layers(model: nn.Module) -> dict[str, Any] | None:
    """Path → LoRA layer, if every layer is the product of two factors on a matrix; else None."""
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
    from transformers.pytorch_utils import Conv1D

    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and type(module) is not ModulesToSaveWrapper:
            return None
        if not isinstance(module, BaseTunerLayer):
            continue
        base = cast("Any", module).base_layer
        matrix = isinstance(base, nn.Linear | Conv1D if type(module) is lora.Linear else nn.Embedding)
        if type(module) not in (lora.Linear, lora.Embedding) or not matrix or cast("Any", module).lora_variant:
            return None
        found[path] = module
    return found
