"""Quantised weights: always recognised, dequantised where that is exact, and refused by name where it is not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molehunt.errors import InvalidInput, NotTestable, printable

SCALES = (".weight_scale_inv", ".weight_scale", ".scale_weight")
"""Suffixes of the scale that multiplies a stored weight, in fp8 and compressed-tensors layouts."""
EXACT = ("fp8", "float-quantized", "int-quantized", "naive-quantized")
"""Layouts in which the weight is exactly (stored integer or fp8 value − zero point) · scale."""
UNPACKED = ("mxfp4", "pack-quantized")
"""Packed layouts whose values are given back (see `packed_weights`)."""
ZERO_POINT = ".weight_zero_point"
PACKED = (".qweight", ".qzeros", ".weight_packed", ".weight_shape", ".g_idx", ".weight_g_idx", ".scales")
"""Suffixes of gptq, awq and packed compressed-tensors."""
QUANT_STATE = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")
"""Suffixes that bitsandbytes adds to the name of a 4-bit weight."""
MAX_EDGE = 2**16
"""Greatest edge of a block of weights that share a scale; real ones have 128."""
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64)
"""Data types of tensors that are not quantised, in a folder of quantised weights."""


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How the weights of a folder were quantised."""

    method: str
    """Name of the method in the config, such as `fp8`, `gptq`, `compressed-tensors/int-quantized`."""
    exact: bool
    scales: frozenset[str]
    """Names of tensors that are scales or zero points of others."""
    packed: frozenset[str]
    """Names of tensors of an inexact layout, whose values are not weights."""
    block: tuple[int, int] | None = None
    """Numbers of rows and columns that share a scale, if the config states them."""

    def dequantise(self, name: str, stored: Tensor, scale_of: Callable[[str], Tensor]) -> Tensor:
        """The weight that `stored` encodes, in fp32; `stored` itself if it was not quantised.

        Raises NotTestable for a tensor of an inexact layout, and for a scale that is missing or does not fit.
        """
        module = name.removesuffix(".weight")
        scale_name = next((module + suffix for suffix in SCALES if module + suffix in self.scales), None)
        if name in self.packed or (scale_name is None and stored.dtype not in PLAIN):
            raise NotTestable(
                f"{printable(name)} is quantised by {printable(self.method, 40)}, which cannot be undone exactly.\n"
                "Compare the unquantised release, or the adapter that was merged into it."
            )
        if scale_name is None or not name.endswith(".weight"):
            return stored
        value, scale = stored.float(), _spread(scale_of(scale_name).float(), stored, name, self.block)
        if module + ZERO_POINT in self.scales:
            value = value - _spread(scale_of(module + ZERO_POINT).float(), stored, name, self.block)
        return value * scale


def recognise(config: Mapping[str, Any], names: frozenset[str]) -> Quantisation | None:
    """The quantisation that config.json and the tensor names indicate; None for plain weights.

    Raises InvalidInput for blocks that no model has.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    scales = frozenset(n for n in names if n.endswith((*SCALES, ZERO_POINT)))
    packed = frozenset(n for n in names if n.endswith(PACKED)) | _bitsandbytes(names)
    if not isinstance(settings, Mapping) and not packed:
        return None if not scales else Quantisation(method="fp8", exact=True, scales=scales, packed=frozenset())
    settings = settings if isinstance(settings, Mapping) else {}
    method = str(settings.get("quant_method", "unknown"))
    layout = str(settings.get("format", method))
    exact = layout in EXACT and not packed
    return Quantisation(
        method=method if layout == method else f"{method}/{layout}",
        exact=exact or layout in UNPACKED,
        scales=scales if exact else frozenset(),
        packed=packed,
        block=_block_edges(settings),
    )


def _bitsandbytes(names: frozenset[str]) -> frozenset[str]:
    """Names of the quantisation states that bitsandbytes stores, and of the weights that they belong to."""
    four_bit = {n: n.removesuffix(s) for n in names for s in QUANT_STATE if n.endswith(s)}
    four_bit |= {n: n.split(".quant_state.")[0] for n in names if ".quant_state." in n}
    eight_bit = {n: n.removesuffix("SCB") + "weight" for n in names if n.endswith(".SCB")}
    return frozenset(four_bit) | frozenset(eight_bit) | (names & {*four_bit.values(), *eight_bit.values()})


def _block_edges(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Block edges from `weight_block_size` (fp8) or the one `block_structure` of compressed-tensors."""
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [g.get("weights") for g in groups if isinstance(g, Mapping)]
    sizes = [settings.get("weight_block_size"), *(w.get("block_structure") for w in weights if isinstance(w, Mapping))]
    fit = {tuple(s) for s in sizes if isinstance(s, list) and len(s) == 2 and all(type(e) is int and e > 0 for e in s)}
    if any(edge > MAX_EDGE for edges in fit for edge in edges):
        raise InvalidInput(
            f"config.json says that blocks of {printable(str([list(edges) for edges in fit]), 60)} weights share a scale; "
            f"edges of up to {MAX_EDGE} are believed.\nGet the config that belongs to these weights."
        )
    return fit.pop() if len(fit) == 1 else None


def _spread(scale: Tensor, stored: Tensor, name: str, block: tuple[int, int] | None) -> Tensor:
    """`scale` repeated to the shape of `stored`: it is one number, one per row, or one per block."""
    if scale.numel() == 1:
        return scale.reshape(1)
    if scale.ndim == 1 and len(scale) == len(stored):
        return scale.reshape(-1, *[1] * (stored.ndim - 1))
    if scale.ndim == 2 and stored.ndim == 2:
        for rows, columns in ([] if block is None else [block]) + [_even_block(scale, stored)]:
            if rows and columns and [-(-stored.shape[0] // rows), -(-stored.shape[1] // columns)] == list(scale.shape):
                spread = scale.repeat_interleave(min(rows, len(stored)), 0)[: len(stored)]
                return spread.repeat_interleave(min(columns, stored.shape[1]), 1)[:, : stored.shape[1]]
    raise NotTestable(
        f"the scale of {printable(name)} has the shape {list(scale.shape)}, which does not fit {list(stored.shape)}"
    )


def _even_block(scale: Tensor, stored: Tensor) -> tuple[int, int]:
    """Edge lengths of equal blocks; 0 where the division leaves a remainder, because block limits are then unknown."""
    rows, columns = (w // s if s and w % s == 0 else 0 for w, s in zip(stored.shape, scale.shape, strict=True))
    return rows, columns
