"""Quantised weights: recognised always, dequantised where that is exact, refused by name where it is not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from molehunt.errors import NotTestable, printable

SCALES = (".weight_scale_inv", ".weight_scale", ".scale_weight")
"""Suffixes of the scale that multiplies a stored weight, in fp8 and compressed-tensors layouts."""
EXACT = ("fp8", "float-quantized", "int-quantized", "naive-quantized")
"""Layouts whose stored integers or fp8 values times their scale are the weight, exactly."""


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How the weights of a folder were quantised."""

    method: str
    """As the config names it, such as `fp8`, `gptq`, `compressed-tensors/int-quantized`."""
    exact: bool
    scales: frozenset[str]
    """Tensors that are scales of others."""
    packed: frozenset[str]
    """Tensors of an inexact layout, whose values are no weights."""

    def dequantise(self, name: str, stored: Tensor, scale_of: Callable[[str], Tensor]) -> Tensor:
        """The weight that `stored` stands for, in fp32; `stored` itself where it was not quantised.

        Raises NotTestable for a tensor of an inexact layout, and for a scale that does not fit the weight.
        """
        if name in self.packed:
            raise NotTestable(
                f"{printable(name)} is quantised by {printable(self.method, 40)}, which cannot be undone exactly.\n"
                "Compare the unquantised release, or the adapter that was merged into it."
            )
        module = name.removesuffix(".weight")
        scale_name = next((module + suffix for suffix in SCALES if module + suffix in self.scales), None)
        if scale_name is None or not name.endswith(".weight"):
            return stored
        return stored.float() * _spread(scale_of(scale_name).float(), stored, name)


def recognise(config: Mapping[str, Any], names: frozenset[str]) -> Quantisation | None:
    """The quantisation that config.json and the tensor names tell of; None for plain weights."""
    told = config.get("quantization_config") or config.get("compression_config")
    scales = frozenset(n for n in names if n.endswith(SCALES))
    packed = frozenset(
        n for n in names if n.endswith((".qweight", ".qzeros", ".weight_packed", ".weight_shape", ".g_idx", ".scales"))
    )
    quant_state = frozenset(n for n in names if ".quant_state" in n or n.endswith((".absmax", ".quant_map", ".SCB")))
    if not isinstance(told, Mapping) and not packed and not quant_state:
        return None if not scales else Quantisation(method="fp8", exact=True, scales=scales, packed=frozenset())
    told = told if isinstance(told, Mapping) else {}
    method = str(told.get("quant_method", "unknown"))
    layout = str(told.get("format", method))
    exact = layout in EXACT and not packed and not quant_state
    if not exact and not packed:
        # weights are stored under their own names (bitsandbytes): every 2-d block weight is packed
        packed = frozenset(n for n in names if n.endswith("_proj.weight")) | quant_state
    label = method if layout == method else f"{method}/{layout}"
    return Quantisation(
        method=label, exact=exact, scales=scales if exact else frozenset(), packed=packed | (quant_state)
    )


def _spread(scale: Tensor, stored: Tensor, name: str) -> Tensor:
    """`scale` repeated to the shape of `stored`: one number, one a row, or one a block."""
    if scale.numel() == 1:
        return scale.reshape(1)
    if scale.ndim == 1 and len(scale) == len(stored):
        return scale[:, None]
    if scale.ndim == 2 and stored.ndim == 2:
        rows, columns = (-(-stored.shape[i] // scale.shape[i]) for i in (0, 1))
        rows, columns = (_block(rows), _block(columns))
        spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        if spread.shape[0] >= stored.shape[0] and spread.shape[1] >= stored.shape[1]:
            return spread[: stored.shape[0], : stored.shape[1]]
    raise NotTestable(
        f"the scale of {printable(name)} has the shape {list(scale.shape)}, which does not fit {list(stored.shape)}"
    )


def _block(size: int) -> int:
    """The block edge behind a rounded-up division: a power of two where one is near."""
    power = 1 << (size - 1).bit_length()
    return power if power >= 16 and power - size < size // 4 else size
