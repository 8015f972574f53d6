"""The rounding that a GGUF format made: the distance between the values that each block of weights can take."""

from typing import Any

import numpy as np
import numpy.typing as npt

SLICE = 256
"""Number of rows that are rated at a time."""
PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
"""Formats whose values stand in the file as they are: their rounding is that of the type in which they are kept."""
CLIPPING = ("Q4_0", "Q5_0", "Q3_K")
"""Formats whose codes reach one step less far on one side: the largest value of that side is cut off, always downwards."""
MARGIN, CLIPPING_MARGIN = 1.5, 2.0
"""How many times larger than that of independent errors the norm may be, since a block's values share a scale. The largest
ratios over SmolLM2, Gemma 3 270M and the embedded models are 1.28, and 1.98 for `CLIPPING`."""
GAP_BLOCK = 32
"""Number of neighbouring values that share a scale in formats without even steps, at least."""
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def rounding_norm(data: npt.NDArray[Any], kind: Any) -> float:
    """Spectral norm of the error that the format made of a matrix, in units of the weights; 0 for plain formats.

    Each value's error is uniform over the step of its block. The norm of a random matrix with these variances is about
    the largest norm of a row plus the largest of a column, as in `noise_floor`, here times a margin. Of a stack of
    experts' matrices, the largest norm counts.

    Args:
        data: the tensor's blocks as the package gguf reads them: the bytes of a row along the last axis.
        kind: a `GGMLQuantizationType`.
    """
    if kind.name in PLAIN or data.ndim < 2:
        return 0.0
    margin = CLIPPING_MARGIN if kind.name in CLIPPING else MARGIN
    return margin * max(_matrix_norm(rows, kind) for rows in data.reshape(-1, *data.shape[-2:]))


def _matrix_norm(data: Bytes, kind: Any) -> float:
    columns: npt.NDArray[np.float64] | None = None
    widest = 0.0
    for start in range(0, len(data), SLICE):
        variance = np.square(steps(np.ascontiguousarray(data[start : start + SLICE]), kind).astype(np.float64)) / 12
        summed = variance.sum(0)
        columns = summed if columns is None else columns + summed
        widest = max(widest, float(variance.sum(1).max()))
    return 0.0 if columns is None else float(columns.max()) ** 0.5 + widest**0.5


def steps(data: Bytes, kind: Any) -> Floats:
    """Distance from each value of some rows to the next one that its block can hold.

    Formats of even steps state it as the block's scale. In the others (IQ, TQ, MXFP4) it is the wider of the gaps to the
    next smaller and the next larger value that occur nearby, which is rather too wide.
    """
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    block, width = GGML_QUANT_SIZES[kind]
    n_rows, n_columns = len(data), data.shape[-1] // width * block
    blocks = data.reshape(-1, width)
    scales = _block_scales(blocks, kind.name)
    if scales is not None:
        return np.repeat(np.abs(scales), block // scales.shape[1], axis=1).reshape(n_rows, n_columns)
    values = np.asarray(dequantize(data, kind), dtype=np.float32).reshape(-1, GAP_BLOCK)
    order = np.argsort(values, axis=1)
    ranked = np.take_along_axis(values, order, axis=1)
    gaps = _wider_gaps(ranked)
    back = np.empty_like(gaps)
    np.put_along_axis(back, order, gaps, axis=1)
    return back.reshape(n_rows, n_columns)


def _wider_gaps(ranked: Floats) -> Floats:
    """For each value of sorted rows, the wider of the gaps to the nearest different values below and above."""
    rise = np.diff(ranked, axis=1)
    below = np.zeros_like(ranked)
    above = np.zeros_like(ranked)
    for i in range(1, ranked.shape[1]):
        below[:, i] = np.where(rise[:, i - 1] > 0, rise[:, i - 1], below[:, i - 1])
        above[:, -i - 1] = np.where(rise[:, -i] > 0, rise[:, -i], above[:, -i])
    return np.maximum(below, above)


def _block_scales(blocks: Bytes, name: str) -> Floats | None:
    """The scales of each block's parts, in order; None for formats whose steps are uneven.

    The layouts are those of ggml's `ggml-common.h`.
    """
    if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        return _halves(blocks[:, :2])
    if name == "Q2_K":
        return _halves(blocks[:, 80:82]) * (blocks[:, :16] & 15)
    if name == "Q3_K":
        return _halves(blocks[:, 108:110]) * _scales_of_q3(blocks[:, 96:108])
    if name in ("Q4_K", "Q5_K"):
        return _halves(blocks[:, :2]) * _scales_of_q4(blocks[:, 4:16])
    if name == "Q6_K":
        return _halves(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return None


def _halves(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _scales_of_q3(packed: Bytes) -> Floats:
    """16 signed scales of 6 bits: the low four bits of two in each of 8 bytes, their high bits in the last 4."""
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:12] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    return (low | (high << 4)).astype(np.float32) - 32


def _scales_of_q4(packed: Bytes) -> Floats:
    """8 scales of 6 bits: four in the low bits of 4 bytes; four in the last 4 bytes and the high bits of the first."""
    first = packed[:, :4] & 63
    last = (packed[:, 8:12] & 15) | ((packed[:, :4] >> 6) << 4)
    return np.concatenate([first, last], axis=1).astype(np.float32)
