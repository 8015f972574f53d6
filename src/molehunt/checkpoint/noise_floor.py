"""What rounding alone explains: a change of the weights below it is no claim."""

import torch
from jaxtyping import Float
from torch import Tensor

MANTISSA = {
    torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7, torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 2,
}  # fmt: skip
"""Stored mantissa bits."""
SLICE = 64
"""Rows rated at a time."""
SMALLEST_EXPONENT = {torch.float16: -14, torch.float8_e4m3fn: -6, torch.float8_e5m2: -14}
"""Below 2 to this power the spacing stays the same (subnormal numbers); other formats reach far under any weight."""


def noise_floor(weight: Float[Tensor, "d_out d_in"], stored: torch.dtype) -> float:
    """Spectral norm of the error that rounding `weight` to `stored` makes, in units of the weights.

    Each entry's error is uniform over the spacing of the format at its size, so its variance is spacing²/12. A random
    matrix with these variances has spectral norm about max row norm + max column norm (of the standard deviations).

    Integers and formats without a known spacing are rated by the spacing of their own values: the smallest step that
    occurs between two of them.

    Source: Latała's bound for independent entries; checked against measured rounding in the tests.
    """
    steps = None if stored in MANTISSA else weight.detach().float().flatten()[: 2**16].unique().diff()
    columns = torch.zeros(weight.shape[1], dtype=torch.float64)
    widest = 0.0
    for rows in weight.detach().split(SLICE):  # whole fp32 copies would be most of what a comparison needs
        variance = _spacing(rows.float(), stored, steps).square() / 12
        columns += variance.sum(0).double()
        widest = max(widest, float(variance.sum(1).amax()))
    return float(columns.amax()) ** 0.5 + widest**0.5


def _spacing(value: Tensor, stored: torch.dtype, steps: Tensor | None) -> Tensor:
    """Distance to the next number that the format can hold, for each entry."""
    if steps is None:
        exponent = value.abs().clamp_min(torch.finfo(torch.float32).tiny).log2().floor()
        if stored in SMALLEST_EXPONENT:
            exponent = exponent.clamp_min(SMALLEST_EXPONENT[stored])
        return torch.exp2(exponent - MANTISSA[stored]).masked_fill(value == 0, 0.0)
    return torch.full_like(value, float(steps.min()) if len(steps) else 0.0)
