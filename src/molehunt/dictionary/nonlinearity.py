"""From encoder outputs to codes, at inference: the four kinds that every known family reduces to.

BatchTopK and Matryoshka dictionaries are JumpReLU ones once trained: their threshold is fixed.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ReLUActivation:
    """Every latent with a positive pre-activation fires."""

    def __call__(self, pre: Float[Tensor, "tokens d_dict"]) -> Float[Tensor, "tokens d_dict"]:
        return pre.relu()


@dataclass(frozen=True)
class TopKActivation:
    """The k largest pre-activations fire, where they are positive. Source: Gao et al., arXiv 2406.04093, §2.3."""

    k: int

    def __call__(self, pre: Float[Tensor, "tokens d_dict"]) -> Float[Tensor, "tokens d_dict"]:
        values, latents = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, latents, values.relu())


@dataclass(frozen=True, eq=False)
class JumpReLUActivation:
    """A latent fires when its pre-activation is positive and exceeds its own threshold. Source: arXiv 2407.14435."""

    threshold: Float[Tensor, " d_dict"]

    def __call__(self, pre: Float[Tensor, "tokens d_dict"]) -> Float[Tensor, "tokens d_dict"]:
        return torch.where(pre > self.threshold, pre, torch.zeros_like(pre)).relu()


@dataclass(frozen=True, eq=False)
class GatedActivation:
    """One bias decides which latents fire, another scale and bias how much. Source: arXiv 2404.16014, §3.

    `pre` holds x·W_enc without a bias: the dictionary's `b_enc` is 0.
    """

    b_gate: Float[Tensor, " d_dict"]
    r_mag: Float[Tensor, " d_dict"]
    b_mag: Float[Tensor, " d_dict"]

    def __call__(self, pre: Float[Tensor, "tokens d_dict"]) -> Float[Tensor, "tokens d_dict"]:
        size = (pre * self.r_mag.exp() + self.b_mag).relu()
        return torch.where(pre + self.b_gate > 0, size, torch.zeros_like(size))


@dataclass(frozen=True)
class GroupMaxActivation:
    """The largest of each group of `d_dict / groups` neighbours fires, where positive. Source: sparsify (EleutherAI)."""

    groups: int

    def __call__(self, pre: Float[Tensor, "tokens d_dict"]) -> Float[Tensor, "tokens d_dict"]:
        grouped = pre.relu().unflatten(-1, (self.groups, -1))
        values, place = grouped.max(-1, keepdim=True)
        return torch.zeros_like(grouped).scatter_(-1, place, values).flatten(-2)


def only(nonlinearity: "Nonlinearity", latents: Int[Tensor, " n"]) -> "Nonlinearity | None":
    """The same function on some latents alone; None where latents compete, so that all must be computed."""
    if isinstance(nonlinearity, JumpReLUActivation):
        return JumpReLUActivation(nonlinearity.threshold[latents])
    if isinstance(nonlinearity, GatedActivation):
        return GatedActivation(nonlinearity.b_gate[latents], nonlinearity.r_mag[latents], nonlinearity.b_mag[latents])
    return nonlinearity if isinstance(nonlinearity, ReLUActivation) else None


Nonlinearity: TypeAlias = ReLUActivation | TopKActivation | JumpReLUActivation | GatedActivation | GroupMaxActivation
