"""Sparse codes in training: only the latents that fire are decoded, and only they receive gradients.

A dense step costs five products of size tokens × d_dict × d_in. Here one remains, the pre-activations; measured on one
CPU core at d_in 128, d_dict 2,048, k 32: decode .9 ms for 11, decoder gradient 2.1 for 13, code gradient .7 for 11.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which latents fire on which tokens, by token and by latent."""

    start: Int[Tensor, " starts"]
    """Token t owns entries start[t] to start[t + 1]; one more than tokens."""
    latent: Int[Tensor, " entries"]
    """Latent of each entry, in ascending order within a token."""
    d_dict: int

    @classmethod
    def of_rows(cls, latents: Int[Tensor, "tokens k"], d_dict: int) -> "Pattern":
        """The same number of latents, each given once, on every token; must be ascending in a row."""
        tokens, k = latents.shape
        start = torch.arange(0, tokens * k + 1, k, device=latents.device)
        return cls(start, latents.flatten(), d_dict)

    @classmethod
    def of_mask(cls, fires: Bool[Tensor, "tokens d_dict"]) -> "Pattern":
        """The entries at which `fires` is True."""
        token, latent = fires.nonzero(as_tuple=True)
        count = torch.bincount(token, minlength=len(fires))  # fires.sum(1) would copy the mask to int64
        return cls(torch.cat([count.new_zeros(1), count.cumsum(0)]), latent.contiguous(), fires.shape[1])

    @property
    def tokens(self) -> int:
        return len(self.start) - 1

    def matrix(self, values: Float[Tensor, " entries"]) -> Tensor:
        """`values` as a sparse [tokens d_dict] matrix."""
        return _csr(self.start, self.latent, values, (self.tokens, self.d_dict))

    @cached_property
    def token(self) -> Int[Tensor, " entries"]:
        """Number of the token of each entry."""
        return torch.repeat_interleave(torch.arange(self.tokens, device=self.start.device), self.start.diff())

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Start of each latent's entries, their tokens, and where they lie among this pattern's entries."""
        order = self.latent.argsort(stable=True)  # stable: a token's place within a latent must not vary
        count = torch.bincount(self.latent, minlength=self.d_dict)
        return torch.cat([count.new_zeros(1), count.cumsum(0)]), self.token[order], order

    def fired(self) -> Bool[Tensor, " {self.d_dict}"]:
        """Which latents fire on any token."""
        return torch.bincount(self.latent, minlength=self.d_dict) > 0


def _csr(start: Tensor, column: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(start, column, values, size=size, check_invariants=False)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, values: Tensor, x: Tensor, encoder: Tensor, b_enc: Tensor, pattern: Pattern
    ) -> Tensor:
        ctx.save_for_backward(x)
        cast("Any", ctx).pattern = pattern
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (x,) = grads, ctx.saved_tensors
        start, token, order = ctx.pattern.by_latent
        by_latent = _csr(start, token, grad[order], (ctx.pattern.d_dict, len(x)))
        bias = torch.zeros(ctx.pattern.d_dict, device=grad.device).index_add_(0, ctx.pattern.latent, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return None, None, by_latent @ x, bias, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, decoder: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, decoder)
        cast("Any", ctx).pattern = pattern
        with torch.autocast(values.device.type, enabled=False):  # no sparse product exists in bf16
            return pattern.matrix(values) @ decoder

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (values, decoder) = grads, ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        grad = grad.contiguous()
        start, token, order = pattern.by_latent
        with torch.autocast(grad.device.type, enabled=False):
            to_values = torch.sparse.sampled_addmm(pattern.matrix(torch.zeros_like(values)), grad, decoder.mT, beta=0.0)
            to_decoder = _csr(start, token, values[order], (pattern.d_dict, len(grad))) @ grad
        return to_values.values(), to_decoder, None


def encode_chosen(
    pre: Float[Tensor, "tokens d_dict"],
    x: Float[Tensor, "tokens d_in"],
    encoder: Float[Tensor, "d_dict d_in"],
    b_enc: Float[Tensor, " d_dict"],
    pattern: Pattern,
) -> Float[Tensor, " entries"]:
    """Pre-activations at the pattern's entries, differentiable in encoder and b_enc.

    Args:
        pre: x·encoderᵀ + b_enc, computed without gradients.
    """
    return _Encode.apply(pre[pattern.token, pattern.latent].float(), x, encoder, b_enc, pattern)  # pyright: ignore[reportReturnType]


def decode_sparse(
    values: Float[Tensor, " entries"], decoder: Float[Tensor, "d_dict d_out"], pattern: Pattern
) -> Float[Tensor, "tokens d_out"]:
    """Σ over a token's latents of value × decoder row; differentiable in both."""
    return _Decode.apply(values, decoder, pattern)  # pyright: ignore[reportReturnType]


def largest_in_batch(
    scores: Float[Tensor, "tokens d_dict"], n: int, floor: float
) -> tuple[Bool[Tensor, "tokens d_dict"], float]:
    """The `n` largest positive entries of all, and the smallest of them; entries that equal the smallest all count.

    Fewer, where fewer are positive.

    Args:
        floor: a guess below the answer. A good one makes this one pass; a bad one costs a second, no more.
    """
    over = scores[scores > floor]
    if len(over) < n and floor > 0:
        over = scores[scores > 0]
    n = min(n, len(over))
    if not n:
        return torch.zeros_like(scores, dtype=torch.bool), 0.0
    cut = float(over.kthvalue(len(over) - n + 1).values)
    return scores >= cut, cut
