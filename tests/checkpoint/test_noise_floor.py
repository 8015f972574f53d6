"""The floor bounds what rounding really does, and not by much."""

import pytest
import torch

from molehunt.checkpoint.noise_floor import noise_floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_it_is_within_a_third_of_measured_rounding(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    weight = scale * torch.randn(200, 300)
    measured = float(torch.linalg.matrix_norm(weight.to(dtype).float() - weight, ord=2))
    assert measured / 1.1 < noise_floor(weight, dtype) < 1.35 * measured


def test_finer_formats_have_lower_floors_and_zeros_have_none() -> None:
    weight = torch.randn(50, 40)
    floors = [noise_floor(weight, d) for d in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)]
    assert floors == sorted(floors) and floors[0] < 1e-5
    assert noise_floor(torch.zeros(4, 4), torch.bfloat16) == 0.0


def test_integers_are_rated_by_their_own_steps() -> None:
    weight = torch.randint(-8, 8, (60, 80)).float() * 0.1
    assert noise_floor(weight, torch.int8) == pytest.approx(0.1 / 12**0.5 * (60**0.5 + 80**0.5), rel=1e-3)


@pytest.mark.parametrize(
    ("group", "largest"), [(64, 127), (512, 127), (512, 7)], ids=["int8, scale a group", "int8, a row", "int4 in int8"]
)
def test_integers_times_their_scales_are_rated_by_what_rounding_did(group: int, largest: int) -> None:
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(256, 512)
    parts = weight.view(256, -1, group)
    scale = parts.abs().amax(2, keepdim=True) / largest
    stored = ((parts / scale).round() * scale).view_as(weight)
    measured = float(torch.linalg.matrix_norm(stored - weight, ord=2))
    assert measured / 1.1 < noise_floor(stored, torch.int8) < 2 * measured
