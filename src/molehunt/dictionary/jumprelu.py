"""JumpReLU dictionaries: a learned threshold per latent and an L0 penalty. Source: Rajamanoharan et al., arXiv 2407.14435."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from molehunt.dictionary import nonlinearity
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.trainee import Pass, SquaredError, Trainee
from molehunt.errors import UsageError

BANDWIDTH = 0.1
"""Width around a threshold in which codes give it gradients, in units of scaled inputs."""
SPEED = 10.0
"""How much faster than weights log-thresholds move: an Adam step is of one size for all, and those have far to go."""


class _Jump(torch.autograd.Function):
    """z = p·1[p > θ], with a straight-through rectangle for θ (eq. 11)."""

    @staticmethod
    def forward(ctx: FunctionCtx, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return torch.where(pre > threshold, pre, torch.zeros_like(pre))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (pre, threshold) = grads, ctx.saved_tensors
        near = ((pre - threshold).abs() < BANDWIDTH / 2).to(grad.dtype)
        return grad * (pre > threshold), (-threshold / BANDWIDTH * near * grad).sum(0)


class _Step(torch.autograd.Function):
    """1[p > θ], with a straight-through rectangle for θ (eq. 12)."""

    @staticmethod
    def forward(ctx: FunctionCtx, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).float()  # a count in bf16 would be rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (grad,), (pre, threshold) = grads, ctx.saved_tensors
        near = ((pre - threshold).abs() < BANDWIDTH / 2).to(grad.dtype)
        return None, (-near * grad / BANDWIDTH).sum(0)


class JumpReLU(Trainee):
    """The penalty λ(L0/target − 1)² leads to `target_l0` latents a token, so that dictionaries can be matched in L0."""

    def __init__(
        self, d_in: int, d_dict: int, *, pairing: Pairing, seed: int, target_l0: float = 32.0, l0_weight: float = 0.3
    ) -> None:
        super().__init__(d_in, d_dict, pairing=pairing, seed=seed)
        if not 0 < target_l0 <= d_dict:
            raise UsageError(f"target_l0 must lie in 0..d_dict={d_dict}, got {target_l0}")
        self.target_l0, self.l0_weight = target_l0, l0_weight
        self.level = nn.Parameter(torch.full((d_dict,), 0.5).log() / SPEED)

    def threshold(self) -> Float[Tensor, " d_dict"]:
        """Pre-activations that must be exceeded."""
        return (SPEED * self.level).exp()

    def training_pass(self, x: Float[Tensor, "tokens d_in"], squared_error: SquaredError, progress: float) -> Pass:
        pre, threshold = self.pre(x), self.threshold()
        code: Any = _Jump.apply(pre, threshold)
        error = x - code @ self.decoder - self.b_dec
        fires: Any = _Step.apply(pre, threshold)
        l0 = fires.sum(-1).mean()
        losses = {
            "reconstruction": squared_error(error).mean() / self.d_in,
            "sparsity": self.l0_weight * min(1.0, 10 * progress) * (l0 / self.target_l0 - 1).square(),
        }
        return Pass(losses=losses, fired=(code > 0).any(0), l0=float(l0.detach()))

    def nonlinearity(self) -> nonlinearity.JumpReLUActivation:
        return nonlinearity.JumpReLUActivation((self.threshold() * self.decoder_norms()).detach())
