"""Planted directions are found as well as by a full SVD, and what is claimed of them holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molehunt.direction import weight
from molehunt.direction.weight import difference, difference_norm, frobenius_norm, lora_directions, weight_directions
from molehunt.errors import NotTestable, ShapeMismatch


@pytest.fixture
def always_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight, "EXACT_UP_TO", 0)


def orthonormal(n: int, rank: int, rng: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, rank, generator=rng)).Q.mT


def overlap(a: Tensor, b: Tensor) -> float:
    """Smallest cosine between two spans given by orthonormal rows."""
    return float(torch.linalg.svdvals(a @ b.mT).min())


@pytest.mark.parametrize("exact_up_to", [0, 512])
@given(st.integers(80, 160), st.integers(80, 160), st.integers(1, 5), st.integers(0, 999))
def test_planted_directions_are_found_as_well_as_by_a_full_svd(
    exact_up_to: int, d_out: int, d_in: int, rank: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    write, read = orthonormal(d_out, rank, rng), orthonormal(d_in, rank, rng)
    noise = 0.01 * torch.randn(d_out, d_in, generator=rng)  # spectral norm about .25, below the floor
    change = write.mT @ (torch.arange(rank, 0, -1.0)[:, None] * read) + noise
    base = torch.randn(d_out, d_in, generator=rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight, "EXACT_UP_TO", exact_up_to)
        found = weight_directions(base, base + change, k=rank + 3, floor=0.5, name="W")

    exact = torch.linalg.svd(change)
    torch.testing.assert_close(found.strength, exact.S[:rank], rtol=1e-4, atol=0)
    assert overlap(found.write, exact.U[:, :rank].mT) > 1 - 1e-4
    assert overlap(found.read, exact.Vh[:rank]) > 1 - 1e-4


@pytest.mark.usefixtures("always_sketch")
@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
@pytest.mark.parametrize("decay", [0.3, 0.6, 1.0])
def test_the_sketch_finds_the_span_of_a_slowly_decaying_spectrum(shape: tuple[int, int], decay: float) -> None:
    rng = torch.Generator().manual_seed(3)
    full = min(shape)
    s = torch.arange(1, full + 1.0) ** -decay
    u, v = orthonormal(shape[0], full, rng), orthonormal(shape[1], full, rng)
    change = u.mT @ (s[:, None] * v)

    found = weight_directions(torch.zeros(shape), change, k=8, floor=0.0, name="W")

    assert overlap(found.write, u[:8]) > 0.9999
    torch.testing.assert_close(found.strength, s[:8], rtol=1e-4, atol=0)


@pytest.mark.usefixtures("always_sketch")
@given(st.integers(40, 120), st.integers(40, 120), st.floats(0.0, 2.0), st.integers(0, 999))
def test_the_stated_errors_bound_the_true_ones(d_out: int, d_in: int, decay: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    full = min(d_out, d_in)
    s = torch.arange(1, full + 1.0) ** -decay
    change = orthonormal(d_out, full, rng).mT @ (s[:, None] * orthonormal(d_in, full, rng))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight, "ITERATIONS", range(1, 2))  # crude on purpose: the bound must say so
        found = weight_directions(torch.zeros(d_out, d_in), change, k=4, floor=0.0, name="W")

    left = change - found.write.mT @ (found.strength[:, None] * found.read)
    missed = float(torch.linalg.matrix_norm(left, ord=2))
    assert missed <= found.remainder * (1 + 1e-5) + 1e-6
    assert found.remainder <= 4 * missed + 1e-5  # a bound that says nothing is none
    for strength, residual in zip(found.strength, found.residual, strict=True):
        assert float((s - strength).abs().min()) <= float(residual) + 1e-5
    torch.testing.assert_close(
        found.residual,
        (change @ found.read.mT - found.write.mT * found.strength).norm(dim=0),
        rtol=1e-3,
        atol=1e-5,
    )


@pytest.mark.usefixtures("always_sketch")
def test_a_change_without_direction_is_within_chance_and_says_how_far_it_got() -> None:
    rng = torch.Generator().manual_seed(0)
    found = weight_directions(torch.zeros(400, 300), torch.randn(400, 300, generator=rng), k=8, floor=0.0, name="W")
    assert (found.z < 4).all()
    assert (found.residual > 0).all()  # no gap to converge to: it stops at the cap


def test_identical_matrices_have_no_direction() -> None:
    w = torch.randn(700, 600, generator=torch.Generator().manual_seed(0))
    found = weight_directions(w, w.clone(), k=8, floor=0.0, name="W")
    assert found.write.shape == (0, 700) and found.read.shape == (0, 600)
    assert found.norm == 0 and found.remainder == 0
    assert found.share.shape == (0,) and found.z.shape == (0,)


@pytest.mark.parametrize("floor", [2.5, 0.9, 10.0])
def test_nothing_below_the_floor_is_reported(floor: float) -> None:
    change = torch.zeros(20, 30)
    change[0, 0], change[1, 1], change[2, 2] = 3.0, 2.0, 1.0
    found = weight_directions(torch.zeros(20, 30), change, k=8, floor=floor, name="W")
    assert found.strength.tolist() == pytest.approx([s for s in (3.0, 2.0, 1.0) if s > floor])
    left_out = [s for s in (3.0, 2.0, 1.0) if s <= floor]
    if floor < 4:  # the norm exceeds the floor, so the remainder is known and not merely bounded
        assert found.remainder == pytest.approx(max(left_out, default=0.0), abs=1e-6)
    else:
        assert found.remainder == pytest.approx(14**0.5)


@pytest.mark.parametrize("exact_up_to", [0, 512])
def test_rounding_in_the_svd_itself_is_no_direction(monkeypatch: pytest.MonkeyPatch, exact_up_to: int) -> None:
    monkeypatch.setattr(weight, "EXACT_UP_TO", exact_up_to)
    rng = torch.Generator().manual_seed(0)
    change = orthonormal(90, 2, rng).mT @ orthonormal(80, 2, rng)  # rank 2, up to float32
    assert len(weight_directions(torch.zeros(90, 80), change, k=8, floor=0.0, name="W").strength) == 2


def test_rows_write_and_columns_read() -> None:
    change = torch.zeros(3, 4)
    change[2, 1] = -5.0
    found = weight_directions(torch.zeros(3, 4), change, k=1, floor=0.0, name="W")
    torch.testing.assert_close(found.write, torch.tensor([[0.0, 0.0, 1.0]]))
    torch.testing.assert_close(found.read, torch.tensor([[0.0, -1.0, 0.0, 0.0]]))


@given(st.integers(0, 999), st.sampled_from([1e-3, 1.0, 1e3]))
def test_scale_and_sign_change_only_what_they_must(seed: int, scale: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    change = orthonormal(30, 4, rng).mT @ (torch.tensor([8.0, 4, 2, 1])[:, None] * orthonormal(40, 4, rng))
    zero = torch.zeros(30, 40)
    one = weight_directions(zero, change, k=4, floor=0.1, name="W")
    other = weight_directions(zero, -scale * change, k=4, floor=0.1 * scale, name="W")
    torch.testing.assert_close(other.write, one.write, rtol=0, atol=1e-4)
    torch.testing.assert_close(other.read, -one.read, rtol=0, atol=1e-4)
    torch.testing.assert_close(other.strength, scale * one.strength)
    torch.testing.assert_close(other.z, one.z, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("always_sketch")
def test_same_seed_same_bits_other_seed_same_answer() -> None:
    change = torch.randn(90, 80, generator=torch.Generator().manual_seed(0))
    change[:, 0] += 20
    a, b, c = (weight_directions(torch.zeros(90, 80), change, k=1, floor=0.0, name="W", seed=s) for s in (0, 0, 1))
    assert torch.equal(a.write, b.write)
    assert not torch.equal(a.write, c.write)
    torch.testing.assert_close(a.write, c.write, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_difference_is_not_taken_in_the_stored_precision(dtype: torch.dtype) -> None:
    base = torch.full((300, 2), 1.0, dtype=dtype)
    tuned = base.clone()
    tuned[299, 1] = 2**-12  # the difference needs 12 bits: fp16 has 11, bf16 8
    change = difference(base, tuned)
    assert change.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert change[299, 1] == 2**-12 - 1 and change.count_nonzero() == 1


def test_norms_are_not_summed_in_the_stored_precision() -> None:
    assert frobenius_norm(torch.full((1000, 10), 3.0).bfloat16()) == pytest.approx(300, rel=1e-6)
    assert frobenius_norm(torch.tensor(-2.0)) == 2.0
    one, step = torch.ones(1000, 4).bfloat16(), torch.ones(1000, 4).bfloat16()
    step[::2] += 2**-7
    assert difference_norm(one, step) == pytest.approx(2**-7 * 2000**0.5)


def test_other_shapes_are_refused_with_our_error() -> None:
    with pytest.raises(ShapeMismatch, match=r"o_proj is \[3, 4\] in the base and \[4, 3\]"):
        weight_directions(torch.zeros(3, 4), torch.zeros(4, 3), k=1, floor=0.0, name="o_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_direction_is_taken_from_what_is_no_number(bad: float) -> None:
    tuned = torch.zeros(3, 4)
    tuned[0, 0] = bad
    with pytest.raises(NotTestable, match="evil\\\\x1bname holds NaN or infinity"):
        weight_directions(torch.zeros(3, 4), tuned, k=1, floor=0.0, name="evil\x1bname")
    with pytest.raises(NotTestable, match="NaN or infinity"):
        lora_directions(tuned, torch.zeros(4, 2), 1.0, k=1, name="W")


@settings(max_examples=30)
@given(
    st.integers(2, 60),
    st.integers(2, 60),
    st.integers(1, 70),
    st.sampled_from([-3.0, 1e-3, 2.0]),
    st.integers(0, 99),
)
def test_lora_factors_give_what_the_merged_matrix_gives(d_out: int, d_in: int, r: int, scale: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    b, a = torch.randn(d_out, r, generator=rng), torch.randn(r, d_in, generator=rng)
    k = min(3, r, d_out, d_in)
    found = lora_directions(b, a, scale, k=k, name="W")
    merged = scale * b.double() @ a.double()
    exact = torch.linalg.svd(merged)
    torch.testing.assert_close(found.strength.double(), exact.S[:k], rtol=1e-5, atol=0)
    assert found.norm == pytest.approx(float(merged.norm()), rel=1e-6)
    if len(exact.S) > k and k < r:
        assert found.remainder == pytest.approx(float(exact.S[k]), rel=1e-5, abs=1e-9)
    rebuilt = found.write.mT @ (found.strength[:, None] * found.read)
    best = exact.U[:, :k] @ (exact.S[:k, None] * exact.Vh[:k])
    torch.testing.assert_close(rebuilt.double(), best, rtol=0, atol=1e-5 * float(exact.S[0]) * 10)


def test_an_untrained_adapter_has_no_direction() -> None:
    found = lora_directions(torch.zeros(6, 2), torch.randn(2, 5), 2.0, k=2, name="W")
    assert found.write.shape == (0, 6) and found.norm == 0


def test_an_adapter_too_weak_for_float32_has_no_direction() -> None:
    assert len(lora_directions(torch.ones(6, 1), torch.ones(1, 5), 1e-60, k=1, name="W").strength) == 0


def test_an_adapter_of_deficient_rank_has_only_its_true_directions() -> None:
    b, a = torch.ones(6, 4), torch.ones(4, 5)  # every factor repeats the same one
    found = lora_directions(b, a, 1.0, k=4, name="W")
    assert found.strength.tolist() == pytest.approx([4 * 30**0.5])
