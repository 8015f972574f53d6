"""The size of weight changes that rounding alone explains: a smaller change supports no claim."""

import torch
from jaxtyping import Float
from torch import Tensor

MANTISSA = {
    torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7, torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 2,
}  # fmt: skip
"""Number of stored mantissa bits of each format."""
EQUAL = 1e-5
"""Two values that differ by less than this fraction of the row's largest value count as one value."""
LARGEST_INTEGER = 127
"""Largest signed 8-bit integer; weights are stored in no finer integers."""
SLICE = 64
"""Number of rows that are rated at a time."""
SMALLEST_EXPONENT = {torch.float16: -14, torch.float8_e4m3fn: -6, torch.float8_e5m2: -14}
"""Exponent below which the spacing stays constant (subnormal numbers); other formats reach far below any weight."""


def noise_floor(weight: Float[Tensor, "d_out d_in"], stored: torch.dtype) -> float:
    """Spectral norm of the error that rounding `weight` to `stored` makes, in units of the weights.

    Each entry's error is uniform over the spacing of the format at its size, so its variance is spacing²/12. A random
    matrix with these variances has spectral norm about max row norm + max column norm (of the standard deviations).

    Integers and formats without a known spacing are rated row by row: by the smallest step between two values of the
    row, or, where several scales are mixed in it, by the row's largest value over the largest of 8 bits.

    Source: Latała's bound for independent entries; checked against measured rounding in the tests.
    """
    return rounding_of(weight, stored)[0]


def rounding_of(weight: Float[Tensor, "d_out d_in"], stored: torch.dtype) -> tuple[float, float]:
    """The `noise_floor` of a matrix, and the expected square of the Frobenius norm of the same error."""
    columns = torch.zeros(weight.shape[1], dtype=torch.float64)
    widest = 0.0
    for rows in weight.detach().split(SLICE):  # whole fp32 copies would be most of what a comparison needs
        variance = _spacing(rows.float(), stored).square() / 12
        columns += variance.sum(0).double()
        widest = max(widest, float(variance.sum(1).amax()))
    return float(columns.amax()) ** 0.5 + widest**0.5, float(columns.sum())


def within_rounding(before: Tensor, stored: torch.dtype, after: Tensor, stored_after: torch.dtype) -> bool:
    """Whether rounding to the two formats explains the difference of every entry; false for formats of unknown spacing."""
    if stored not in MANTISSA or stored_after not in MANTISSA:
        return False
    one, other = before.detach().double(), after.detach().double()
    spacing = _spacing(one, stored) + _spacing(other, stored_after)
    return bool(((one - other).abs() <= spacing / 2).all())


def _spacing(value: Tensor, stored: torch.dtype) -> Tensor:
    """Distance to the next number that the format can hold, for each entry."""
    if stored in MANTISSA:
        exponent = value.abs().clamp_min(torch.finfo(torch.float32).tiny).log2().floor()
        if stored in SMALLEST_EXPONENT:
            exponent = exponent.clamp_min(SMALLEST_EXPONENT[stored])
        return torch.exp2(exponent - MANTISSA[stored]).masked_fill(value == 0, 0.0)
    largest = value.abs().amax(1, keepdim=True)
    between = value.sort(1).values.diff(dim=1)
    between = between.masked_fill(between <= largest * EQUAL, torch.inf)
    step = between.amin(1, keepdim=True).nan_to_num(posinf=0.0) if between.shape[1] else torch.zeros_like(largest)
    return torch.maximum(step, largest / LARGEST_INTEGER).expand_as(value)
