"""Objectives of an attack: for each row a loss to descend, and a margin that is above 0 where the behaviour recovered."""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ObjectiveValue:
    """Loss and margin of each row of a batch."""

    loss: Float[Tensor, " batch"]
    margin: Float[Tensor, " batch"]
    """Above 0 where the target is the greedy choice."""


@runtime_checkable
class Objective(Protocol):
    """An objective for the rows of one `Suffix` (or readout), in their order."""

    def __call__(self, out: Float[Tensor, "batch ..."]) -> ObjectiveValue: ...

    def rows(self, kept: Int[Tensor, " kept"]) -> "Objective":
        """The same for some rows."""
        ...


@dataclass(frozen=True, eq=False)
class ChoiceMargin:
    """One token among given ones, at the anchor. The loss is the published one, −(logit(gold) − mean of the others').
    The margin is stricter: gold must lie above every other. Source: arXiv 2606.18322, its WMDP runner.
    """

    gold: Int[Tensor, " batch"]
    others: Int[Tensor, "batch choices"]

    def __call__(self, out: Float[Tensor, "batch pos vocab"]) -> ObjectiveValue:
        first = out[:, 0]
        gold, others = first.gather(1, self.gold[:, None]).squeeze(1), first.gather(1, self.others)
        return ObjectiveValue(loss=others.mean(1) - gold, margin=gold - others.amax(1))

    def rows(self, kept: Int[Tensor, " kept"]) -> "ChoiceMargin":
        return ChoiceMargin(self.gold[kept], self.others[kept])


def logit_difference(indirect: Int[Tensor, " batch"], subject: Int[Tensor, " batch"]) -> ChoiceMargin:
    """logit(IO) − logit(S) at END. Source: Wang et al., arXiv 2211.00593."""
    return ChoiceMargin(indirect, subject[:, None])


@dataclass(frozen=True, eq=False)
class TargetText:
    """An answer, token by token, forced after the prompt: the loss is −mean log p of its tokens, the margin that of the
    least certain one over the best other token. Above 0, greedy decoding under the same perturbation says it.
    """

    tokens: Int[Tensor, "batch answer"]
    real: Bool[Tensor, "batch answer"]

    @classmethod
    def of(cls, answers: list[list[int]], device: torch.device | str = "cpu") -> "TargetText":
        """Raises ValueError for an empty answer."""
        if not all(answers):
            raise ValueError("an answer without tokens is no target")
        longest = max(map(len, answers))
        padded = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers], device=device)
        lengths = torch.tensor([len(answer) for answer in answers], device=device)
        return cls(padded, torch.arange(longest, device=device) < lengths[:, None])

    def __call__(self, out: Float[Tensor, "batch pos vocab"]) -> ObjectiveValue:
        logits = out[:, : self.tokens.shape[1]]
        own = logits.gather(-1, self.tokens[..., None]).squeeze(-1)
        others = logits.scatter(-1, self.tokens[..., None], -torch.inf).amax(-1)
        lost = (logits.logsumexp(-1) - own).masked_fill(~self.real, 0.0)
        return ObjectiveValue(
            loss=lost.sum(1) / self.real.sum(1),
            margin=(own - others).masked_fill(~self.real, torch.inf).amin(1),
        )

    def rows(self, kept: Int[Tensor, " kept"]) -> "TargetText":
        return replace(self, tokens=self.tokens[kept], real=self.real[kept])


@dataclass(frozen=True, eq=False)
class LinearReadout:
    """A linear probe on the activations themselves, as in TPP: no model runs, and the least perturbation is known."""

    weight: Float[Tensor, " d_model"]
    bias: float

    def __call__(self, out: Float[Tensor, "batch pos d_model"]) -> ObjectiveValue:
        margin = out[:, 0] @ self.weight + self.bias
        return ObjectiveValue(loss=-margin, margin=margin)

    def rows(self, kept: Int[Tensor, " kept"]) -> "LinearReadout":
        return self


def least_norm(
    readout: LinearReadout,
    defended: Float[Tensor, "batch d_model"],
    basis: Float[Tensor, "d_model rank"] | None = None,
) -> Float[Tensor, " batch"]:
    """Length of the shortest perturbation outside `basis` that moves each row to the boundary: −margin / ‖P⊥w‖.

    The length is 0 where the row is there already, and infinite where the readout lies inside the basis. Source: the closed form of the
    attack of arXiv 2606.18322 on TPP.
    """
    w = readout.weight.double()
    if basis is not None:
        Q = basis.double()
        free = w - Q @ (Q.T @ w)
        free = free - Q @ (Q.T @ free)
        w = free if float(free.norm()) > 1e-6 * float(readout.weight.norm()) else torch.zeros_like(free)
    margin = defended.double() @ readout.weight.double() + readout.bias
    return (-margin).clamp_min(0).div(w.norm()).nan_to_num(nan=0.0, posinf=torch.inf).float()
