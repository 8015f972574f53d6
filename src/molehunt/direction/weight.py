"""The change of one matrix in a fine-tune, as directions: singular vectors of ΔW above the rounding noise."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.direction.direction import Directions
from molehunt.errors import NotTestable, ShapeMismatch, printable

EXACT_UP_TO = 512
"""Greatest length of the shorter side of a matrix for which a full SVD is computed: it is fast enough."""
SKETCH = 32
"""Least number of columns of the sketch: a product of this width costs no more than reading the matrix."""
ITERATIONS = range(4, 33)
"""Least and greatest number of power iterations. On a slowly decaying spectrum, 1 loses a tenth of the subspace."""
ANGLE = 0.01
"""Sine of the angle to the true subspace at which the iteration stops."""
PROBES = 16
"""Number of random probes of the remainder."""
SLICE = 64
"""Number of rows that are cast to a wider type at a time."""


def weight_directions(
    base: Float[Tensor, "d_out d_in"],
    tuned: Float[Tensor, "_ _"],
    *,
    k: int,
    floor: float,
    name: str,
    seed: int = 0,
) -> Directions:
    """Singular directions of `tuned - base` that stand above rounding noise, strongest first.

    Args:
        base: one weight matrix as stored; rows write, columns read.
        tuned: the same matrix after fine-tuning.
        k: greatest number of directions.
        floor: spectral norm, in units of the weights, that rounding alone explains.
        name: the tensor's name, for messages.
        seed: seed of the random sketch. It only affects digits beyond the stated accuracy.

    Returns:
        0 to k directions. No direction means that the matrix did not change measurably.

    Raises:
        ShapeMismatch: the two matrices differ in shape.
        NotTestable: a weight is NaN or infinite.

    Source: WeightWatch, arXiv 2508.00161 (full SVD there); randomised as in Halko et al., arXiv 0909.4061,
    with the residual as stop rule.
    """
    if base.shape != tuned.shape:
        raise ShapeMismatch(name, tuple(base.shape), tuple(tuned.shape))
    return change_directions(difference(base, tuned), k=k, floor=floor, name=name, seed=seed)


def change_directions(
    change: Float[Tensor, "d_out d_in"], *, k: int, floor: float, name: str, seed: int = 0
) -> Directions:
    """The same as `weight_directions` for a given difference, for callers without memory for both matrices."""
    norm = frobenius_norm(change)
    if not math.isfinite(norm):
        raise NotTestable(f"{printable(name)} holds NaN or infinity: no difference can be taken.")
    if norm <= floor:  # no singular value exceeds the norm
        return _no_directions(name, change, norm, floor)
    if min(change.shape) <= max(EXACT_UP_TO, SKETCH, 2 * k):
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        v, residual, missed = vh.mT, torch.zeros_like(s), 0.0
    else:
        u, s, v, residual, missed = _leading_svd(change, k, floor, norm, seed)
    kept = _resolved(s[:k], floor, change.shape)
    next_one = float(s[kept]) if kept < len(s) else 0.0
    return _signed(
        Directions(
            name=name,
            write=u[:, :kept].mT,
            read=v[:, :kept].mT,
            strength=s[:kept],
            residual=residual[:kept],
            remainder=math.hypot(next_one, missed),  # the two parts have orthogonal column spaces
            norm=norm,
            floor=floor,
        )
    )


def lora_directions(
    lora_b: Float[Tensor, "d_out r"], lora_a: Float[Tensor, "r d_in"], scale: float, *, k: int, name: str
) -> Directions:
    """Exact singular directions of scale · B · A without computing the product; the cost is (d_out + d_in) r².

    B = Q₁R₁ and Aᵀ = Q₂R₂, so the singular values are those of the r × r matrix scale · R₁R₂ᵀ. Nothing was
    rounded into the base weights, so the floor is 0 and only numerically empty directions are dropped.

    Raises:
        NotTestable: a factor holds NaN or infinity.
    """
    if not (lora_b.isfinite().all() and lora_a.isfinite().all() and math.isfinite(scale)):
        raise NotTestable(f"{printable(name)} holds NaN or infinity: the adapter adds no number.")
    q_b, r_b = torch.linalg.qr(lora_b.double())
    q_a, r_a = torch.linalg.qr(lora_a.double().mT)
    u, s, vh = torch.linalg.svd(scale * r_b @ r_a.mT, full_matrices=False)
    empty = float(s.max()) * max(len(q_b), len(q_a)) * torch.finfo(torch.float64).eps
    empty = max(empty, torch.finfo(torch.float32).tiny)
    kept = int((s[:k] > empty).sum())
    return _signed(
        Directions(
            name=name,
            write=(q_b @ u[:, :kept]).mT,
            read=(q_a @ vh[:kept].mT).mT,
            strength=s[:kept],
            residual=torch.zeros(kept),
            remainder=float(s[kept]) if kept < len(s) else 0.0,
            norm=float(s.norm()),
            floor=0.0,
        )
    )


def difference(base: Float[Tensor, "*shape"], tuned: Float[Tensor, "*shape"]) -> Tensor:
    """`tuned - base` in float32 (float64 if either is), without another full-size copy."""
    change = widened(tuned, base.dtype)
    subtract_(change, base)
    return change


def widened(tuned: Float[Tensor, "*shape"], other: torch.dtype) -> Float[Tensor, "*shape"]:
    """A copy in a type that represents the difference: float32, or float64 if either side is."""
    return tuned.to(torch.float64 if torch.float64 in (other, tuned.dtype) else torch.float32, copy=True)


def subtract_(change: Float[Tensor, "*shape"], base: Float[Tensor, "*shape"]) -> None:
    """Subtract `base` from `change` in place, a slice at a time."""
    for rows, theirs in zip(change.split(SLICE), base.split(SLICE), strict=True):
        rows -= theirs.to(change.dtype)


def difference_norm(base: Float[Tensor, "*shape"], tuned: Float[Tensor, "*shape"]) -> float:
    """‖tuned − base‖ in the Frobenius norm, a slice at a time and without a full-size copy."""
    pairs = zip(torch.atleast_1d(base).split(SLICE), torch.atleast_1d(tuned).split(SLICE), strict=True)
    return math.hypot(*(frobenius_norm(difference(a, b)) for a, b in pairs))


def frobenius_norm(weight: Float[Tensor, "..."]) -> float:
    """√Σw², in float32 within a slice of rows and in float64 over them."""
    return math.hypot(*(_norm(rows) for rows in torch.atleast_1d(weight).split(SLICE)))


def _norm(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dtype=torch.promote_types(rows.dtype, torch.float32)))


def _leading_svd(
    a: Float[Tensor, "d_out d_in"], k: int, floor: float, norm: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """U, S, V, the residual of each triplet, and a bound on ‖A − QQᵀA‖ for the sketch Q that U spans.

    Subspace iteration, QR at every half step. A·V is needed for the next step anyway, so the residuals cost
    nothing; by Wedin the sine of the angle to the true subspace is at most residual over gap.
    """
    rng = torch.Generator().manual_seed(seed)
    width = max(SKETCH, 2 * k)
    a_t = a.mT
    q = torch.linalg.qr(a @ torch.randn(a.shape[1], width, generator=rng, dtype=a.dtype)).Q
    u = s = v = residual = a  # the loop runs at least once
    for done in range(1, ITERATIONS.stop):
        p, r = torch.linalg.qr(a_t @ q)
        u_small, s, vh_small = torch.linalg.svd(r.mT)
        u, v = q @ u_small, p @ vh_small.mT
        image = a @ v
        residual = (image - u * s).norm(dim=0)
        wanted = _resolved(s[:k], floor, a.shape)
        settled = wanted == 0 or float(residual[:wanted].norm()) <= ANGLE * float(s[wanted - 1] - s[wanted])
        if done >= ITERATIONS.start and settled:
            break
        q = torch.linalg.qr(image).Q
    return u, s, v, residual, _missed(a, u, norm, rng)


def _resolved(s: Float[Tensor, " k"], floor: float, shape: tuple[int, ...]) -> int:
    """Number of singular values above the rounding of the weights and the rounding in the SVD itself."""
    arithmetic = torch.finfo(s.dtype).eps * (math.sqrt(shape[0]) + math.sqrt(shape[1])) * float(s[0])
    return int((s > max(floor, arithmetic)).sum())


def _missed(a: Float[Tensor, "d_out d_in"], q: Float[Tensor, "d_out l"], norm: float, rng: torch.Generator) -> float:
    """A bound on ‖E‖ for E = A − QQᵀA that fails with probability 1e-10.

    Halko et al., Lemma 4.1, applied to E(EᵀE)² (whose norm is ‖E‖⁵) instead of E: on a flat spectrum the
    lemma's slack of 3.4·√rank shrinks to its fifth root.
    """
    x = torch.randn(a.shape[1], PROBES, generator=rng, dtype=a.dtype)
    for _ in range(2):
        x = a.mT @ _outside(q, a @ (x / norm)) / norm  # scaled: fifth powers vanish or overflow
    x = _outside(q, a @ (x / norm))
    slack = 10 ** (10 / PROBES) * math.sqrt(2 / math.pi)
    return norm * ((slack * float(x.norm(dim=0).max())) ** 0.2 + torch.finfo(a.dtype).eps)


def _outside(q: Float[Tensor, "n l"], x: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    return x - q @ (q.mT @ x)


def _signed(found: Directions) -> Directions:
    """The directions in float32, with each write row's largest entry positive: the sign from an SVD is arbitrary."""
    peak = found.write.gather(1, found.write.abs().argmax(dim=1, keepdim=True)) if len(found.write) else None
    sign = 1.0 if peak is None else peak.sign()
    return replace(
        found,
        write=(found.write * sign).float().contiguous(),
        read=(found.read * sign).float().contiguous(),
        strength=found.strength.float(),
        residual=found.residual.float(),
    )


def _no_directions(name: str, like: Tensor, norm: float, floor: float) -> Directions:
    none = torch.zeros(0)
    return Directions(
        name=name,
        write=torch.zeros(0, like.shape[0]),
        read=torch.zeros(0, like.shape[1]),
        strength=none,
        residual=none,
        remainder=norm,
        norm=norm,
        floor=floor,
    )
