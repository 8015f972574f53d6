"""Weights that are stored as several tensors of packed numbers: their names, their shapes, and their values where known.

A loader makes one matrix of them, so one matrix is what the rest of this package sees. Shapes come from the parts of every
layout. Values are given back for two layouts that are documented and have nothing to choose: mxfp4 as gpt-oss stores it,
and `pack-quantized` of compressed-tensors.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from molehunt.checkpoint.quant_settings import GROUPED, QuantSettings
from molehunt.errors import NotTestable, printable

Layout = Literal["mxfp4", "pack-quantized", "gptq", "awq", "bitsandbytes", "other"]
Read = Callable[[str], Tensor]
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The sixteen numbers of four bits, in the order of their codes."""
E8M0_BIAS = 127
QUANT_STATE = ".quant_state."
MAX_STATE = 2**16
"""Greatest number of bytes of the JSON in which bitsandbytes describes a weight."""
MAX_GROUP = 2**16
"""Greatest number of weights that share a scale, as far as a config is believed."""
ROWS = 1024
"""Number of rows that are unpacked at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedWeight:
    """One weight in a packed layout."""

    layout: Layout
    main: str
    """The tensor that holds the packed numbers."""
    parts: tuple[str, ...]
    """Names of all tensors that it is made of."""
    shape: tuple[int, ...]
    bits: int

    @property
    def exact(self) -> bool:
        """Whether the values are given back."""
        return self.layout in ("mxfp4", "pack-quantized")

    def undone(self, name: str, read: Read) -> Tensor:
        """The weight in fp32. Raises NotTestable for a layout that is not read, and for parts that do not fit."""
        if self.layout == "mxfp4":
            return self._mxfp4(read)[0]
        if self.layout == "pack-quantized":
            return self._integers(name, read)[0]
        raise NotTestable(
            f"{printable(name)} is quantised by {self.layout}, which cannot be undone exactly.\n"
            "Compare the unquantised release, or the adapter that was merged into it."
        )

    def rounding(self, name: str, read: Read) -> float:
        """Spectral norm of the rounding that the layout made: each entry's error is uniform over its step.

        Source: Latała's bound for independent entries, as in `noise_floor`.
        """
        if not self.exact:
            return 0.0
        step = (self._mxfp4(read) if self.layout == "mxfp4" else self._integers(name, read))[1]
        variance = step.reshape(-1, step.shape[-1]).double().square() / 12
        return float(variance.sum(0).amax()) ** 0.5 + float(variance.sum(1).amax()) ** 0.5

    def _mxfp4(self, read: Read) -> tuple[Tensor, Tensor]:
        """Values and steps, as transformers lays them out: experts, inputs, outputs."""
        blocks, scales = read(self.main), read(self.main.removesuffix("_blocks") + "_scales")
        table = torch.tensor(FP4)
        codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
        values = table[codes]
        steps = torch.tensor((0.5, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0) * 2)[codes]
        exponent = (scales.to(torch.int32) - E8M0_BIAS)[..., None]
        return tuple(torch.ldexp(one, exponent).flatten(-2).mT.contiguous() for one in (values, steps))  # pyright: ignore[reportReturnType]

    def _integers(self, name: str, read: Read) -> tuple[Tensor, Tensor]:
        module = self.main.removesuffix("_packed")
        scale = read(f"{module}_scale").float()
        rows, columns = self.shape
        if scale.ndim != 2 or len(scale) != rows or not scale.shape[1]:
            raise _misfit(name, scale)
        values = unpacked(read(self.main), self.bits, columns).float()
        if f"{module}_zero_point" in self.parts:
            zeros = unpacked(read(f"{module}_zero_point").mT, self.bits, rows).mT
            if zeros.shape != scale.shape:
                raise _misfit(name, zeros)
            zeros = zeros.float()
        else:
            zeros = torch.zeros_like(scale)
        groups = scale.shape[1]
        if f"{module}_g_idx" in self.parts:
            group_of = read(f"{module}_g_idx").long()
        elif columns % groups:
            raise _misfit(name, scale)
        else:
            group_of = torch.arange(columns) // (columns // groups)
        if len(group_of) != columns or not bool(((group_of >= 0) & (group_of < groups)).all()):
            raise _misfit(name, group_of)
        step = scale[:, group_of]
        return (values - zeros[:, group_of]) * step, step


def _misfit(name: str, part: Tensor) -> NotTestable:
    return NotTestable(f"a part of {printable(name)} has the shape {list(part.shape)}, which does not fit its weight")


def unpacked(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Signed integers of `bits` bits from rows of int32 words, lowest bits first, without padding between them."""
    starts = torch.arange(columns) * bits
    word, offset = starts // 32, starts % 32
    words = torch.nn.functional.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    parts: list[Tensor] = []
    for rows in words.split(ROWS):
        pair = rows[:, word] | (rows[:, word + 1] << 32)
        parts.append(((pair >> offset) & (2**bits - 1)).to(torch.int16) - 2 ** (bits - 1))
    return torch.cat(parts)


def packed_weights(
    shapes: Mapping[str, tuple[int, ...]], settings: QuantSettings, read: Read
) -> dict[str, PackedWeight]:
    """Name of each weight in a packed layout → where and how it is stored, by the names that the stated method gives.

    Args:
        shapes: of all stored tensors, by name.
        settings: the quantization_config of config.json. Modules that it leaves out are not packed.
        read: gives a stored tensor; only small ones that tell a shape are read here.
    """
    layout_of = _LAYOUTS.get(settings.method)
    if layout_of is None:
        return {}
    made = [layout_of(name, shape, shapes, settings, read) for name, shape in shapes.items()]
    found = dict(one for one in made if one is not None)
    if settings.method in ("bitsandbytes", "mxfp4"):  # these take the parts of every weight, left out or not
        return found
    skipped = settings.skipped(name.removesuffix(".weight") for name in found)
    return {name: weight for name, weight in found.items() if name.removesuffix(".weight") not in skipped}


_Found = tuple[str, PackedWeight] | None
_Shapes = Mapping[str, tuple[int, ...]]


def _mxfp4_weight(name: str, shape: tuple[int, ...], shapes: _Shapes, settings: QuantSettings, read: Read) -> _Found:
    stem = name.removesuffix("_blocks")
    if stem == name or len(shape) < 3 or shapes.get(f"{stem}_scales") != shape[:-1]:
        return None
    logical = (*shape[:-3], shape[-2] * shape[-1] * 2, shape[-3])
    return stem, PackedWeight(layout="mxfp4", main=name, parts=(name, f"{stem}_scales"), shape=logical, bits=4)


def _grouped_weight(name: str, shape: tuple[int, ...], shapes: _Shapes, settings: QuantSettings, read: Read) -> _Found:
    """GPTQ packs along the inputs, AWQ along the outputs; both have one column of scales for each output."""
    module = name.removesuffix(".qweight")
    scales = shapes.get(f"{module}.scales", ())
    if module == name or len(shape) != 2 or len(scales) != 2:
        return None
    bits = settings.stated.get("bits", settings.stated.get("w_bit"))
    bits = bits if type(bits) is int and 1 <= bits <= 8 else 4
    parts = tuple(n for n in (f"{module}.{end}" for end in ("qweight", "qzeros", "scales", "g_idx")) if n in shapes)
    along_inputs = shape[1] == scales[1]
    logical = (scales[1], shape[0] * 32 // bits if along_inputs else shape[0])
    layout: Layout = "gptq" if along_inputs else "awq"
    return f"{module}.weight", PackedWeight(layout=layout, main=name, parts=parts, shape=logical, bits=bits)


def _compressed_weight(
    name: str, shape: tuple[int, ...], shapes: _Shapes, settings: QuantSettings, read: Read
) -> _Found:
    weight = name.removesuffix("_packed")
    if not name.endswith(".weight_packed") or len(shape) != 2:
        return None
    parts = tuple(n for n in shapes if n == name or n.startswith(f"{weight}_"))
    bits, group = _integers_of(settings.stated)
    scale = shapes.get(f"{weight}_scale", ())
    plain = not any(n.endswith("_global_scale") for n in parts) and len(scale) == 2
    if bits and plain and settings.layout == "pack-quantized":
        logical = (shape[0], scale[1] * group)
        if not group and shapes.get(f"{weight}_shape") == (2,):
            logical = tuple(read(f"{weight}_shape").tolist())
        if logical[0] == shape[0] and logical[1] > 0 and shape[1] == -(-logical[1] * bits // 32):
            return weight, PackedWeight(layout="pack-quantized", main=name, parts=parts, shape=logical, bits=bits)
    logical = (shape[0], shape[1] * 2)  # two numbers in a byte, as nvfp4 has them
    return weight, PackedWeight(layout="other", main=name, parts=parts, shape=logical, bits=4)


def _integers_of(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Bits and group size of compressed-tensors, if there is one kind of weights and they are integers; 0 if not known."""
    groups = settings.get("config_groups")
    weights = (
        [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    )
    found = [w for w in weights if isinstance(w, Mapping)]
    if not found or any(w != found[0] for w in found) or found[0].get("type", "int") != "int":
        return 0, 0
    bits, group = found[0].get("num_bits"), found[0].get("group_size")
    return (
        bits if type(bits) is int and 1 <= bits <= 8 else 0,
        group if type(group) is int and 0 < group <= MAX_GROUP else 0,
    )


def _bitsandbytes_weight(
    name: str, shape: tuple[int, ...], shapes: _Shapes, settings: QuantSettings, read: Read
) -> _Found:
    """4 bits: the weight is one column of bytes, and a JSON text beside it tells its shape. 8 bits: it keeps its shape."""
    if settings.bits == 8:
        if not name.endswith(".SCB") or f"{name.removesuffix('SCB')}weight" not in shapes:
            return None
        weight = f"{name.removesuffix('SCB')}weight"
        parts = tuple(n for n in (weight, name, f"{weight}_format") if n in shapes)
        return weight, PackedWeight(layout="bitsandbytes", main=weight, parts=parts, shape=shapes[weight], bits=8)
    weight, state, _ = name.partition(QUANT_STATE)
    if not state or weight not in shapes:
        return None
    parts = (weight, *(n for n in shapes if n.startswith(f"{weight}.")))
    logical = _stated_shape(read(name)) if math.prod(shape) <= MAX_STATE else None
    if logical is None or math.prod(logical) != 2 * math.prod(shapes[weight]):
        logical = shapes[weight]
    return weight, PackedWeight(layout="bitsandbytes", main=weight, parts=parts, shape=logical, bits=4)


def _stated_shape(state: Tensor) -> tuple[int, ...] | None:
    """The shape in a quantisation state of bitsandbytes, which is JSON in a tensor of bytes."""
    try:
        shape = json.loads(bytes(state.to(torch.uint8).flatten().tolist()))["shape"]
        return tuple(shape) if all(type(size) is int and size > 0 for size in shape) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


_LAYOUTS: dict[str, Callable[[str, tuple[int, ...], _Shapes, QuantSettings, Read], _Found]] = {
    "mxfp4": _mxfp4_weight,
    **dict.fromkeys(GROUPED, _grouped_weight),
    "compressed-tensors": _compressed_weight,
    "bitsandbytes": _bitsandbytes_weight,
}
