"""Weight directions against a full SVD per matrix, which is what the WeightWatch code does."""

import torch
from row import Row, seconds, shown
from torch import Tensor

from molehunt.direction.weight import lora_directions, weight_directions

K = 8
RANK = 16


def against_full_svd(shape: tuple[int, int]) -> list[Row]:
    """A bf16 pair whose change has a slowly decaying spectrum over a flat bulk, and bf16 rounding on top."""
    rng = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(shape, generator=rng)).bfloat16()
    tuned = (base.float() + _change(shape, 0.03 * float(base.float().norm()), rng)).bfloat16()

    def ours() -> Tensor:
        return weight_directions(base, tuned, k=K, floor=0.0, name="W").write

    exact: list[Tensor] = []

    def theirs() -> None:
        exact.append(torch.linalg.svd(tuned.float() - base.float(), full_matrices=False).U[:, :K])

    found, fast, slow = ours(), seconds(ours, 3), seconds(theirs, 1)
    overlap = float(torch.linalg.svdvals(found @ exact[0]).min())
    return [
        Row(
            work=f"top {K} directions, {shape[0]}×{shape[1]} bf16",
            against="full SVD of ΔW",
            ours=shown(fast),
            theirs=shown(slow),
            ratio=slow / fast,
            aim="≥ 30×, overlap ≥ .999",
            met=slow / fast >= 30 and overlap >= 0.999,
            note=f"smallest cosine between the two top-{K} spans {overlap:.6f}",
        )
    ]


def lora_against_merged(shape: tuple[int, int]) -> list[Row]:
    rng = torch.Generator().manual_seed(0)
    b, a = torch.randn(shape[0], RANK, generator=rng), torch.randn(RANK, shape[1], generator=rng)
    scale, zero = 2.0, torch.zeros(shape)

    def ours() -> Tensor:
        return lora_directions(b, a, scale, k=K, name="W").strength

    exact: list[Tensor] = []

    def full() -> None:
        exact.append(torch.linalg.svd(scale * b @ a, full_matrices=False).S[:K])

    def sketched() -> None:
        weight_directions(zero, scale * b @ a, k=K, floor=0.0, name="W")

    fast, slow, middle = seconds(ours, 20), seconds(full, 1), seconds(sketched, 3)
    error = float(((ours() - exact[0]) / exact[0]).abs().max())
    work = f"top {K} directions, LoRA r={RANK}, {shape[0]}×{shape[1]}"
    return [
        Row(
            work=work,
            against="merge, full SVD",
            ours=shown(fast),
            theirs=shown(slow),
            ratio=slow / fast,
            aim="≥ 1000×, equal to 1e-5",
            met=slow / fast >= 1000 and error <= 1e-5,
            note=f"largest relative difference of σ {error:.1e}",
        ),
        Row(
            work=work,
            against="merge, our own randomised SVD",
            ours=shown(fast),
            theirs=shown(middle),
            ratio=middle / fast,
            aim="–",
            met=None,
        ),
    ]


def _change(shape: tuple[int, int], norm: float, rng: torch.Generator) -> Tensor:
    """Spectrum i^-½ over 64 directions, and a Gaussian bulk that holds half of the squared norm."""
    u = torch.linalg.qr(torch.randn(shape[0], 64, generator=rng)).Q
    v = torch.linalg.qr(torch.randn(shape[1], 64, generator=rng)).Q
    tail = (u * torch.arange(1, 65.0) ** -0.5) @ v.mT
    bulk = torch.randn(shape, generator=rng)
    return norm * (tail / tail.norm() + bulk / bulk.norm()) / 2**0.5
