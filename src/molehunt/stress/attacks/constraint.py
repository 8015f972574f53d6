"""What a perturbation may not change: the codes of the clamped latents.

`free` constrains nothing. `paper` is arXiv 2606.18322 as its code runs: the gradient loses its part along the clamped
latents' encoder columns, and Adam then scales each coordinate, which restores much of it. `exact` removes that part from
the perturbation itself, inside the graph, so that no optimiser can leak. For encoders that read x through W_enc column by
column, the codes are those of the defended state but for rounding.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import GroupMaxActivation, Nonlinearity, TopKActivation, only
from molehunt.steer.clamp import check_latents

RIDGE = 1e-4
"""Ridge that the published code adds to AᵀA."""
RANK = 1e-6
"""Encoder columns count as dependent if their part outside the others' span is below this share of the largest."""


@runtime_checkable
class Constraint(Protocol):
    """What an attack may not change."""

    name: ClassVar[str]

    def gradient(self, gradient: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The gradient that the optimiser receives."""
        ...

    def __call__(
        self, delta: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The perturbation that is added to `defended`. It is differentiable in `delta`, and 0 for 0."""
        ...

    def violation(
        self, acts: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, " batch"]:
        """How far each row is outside the constraint; 0 where it is kept. Differentiable.

        This covers what `__call__` cannot enforce, such as which latents a TopK encoder lets fire.
        """
        ...


@runtime_checkable
class RowwiseConstraint(Protocol):
    """A constraint that is made for the rows of one batch, and can be reduced to some of them."""

    def rows(self, kept: Int[Tensor, " kept"]) -> Constraint:
        """The same constraint for some rows."""
        ...


@dataclass(frozen=True)
class Free:
    """No constraint but the norm."""

    name: ClassVar[str] = "free"

    def gradient(self, gradient: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return gradient

    def __call__(
        self, delta: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        return delta

    def violation(
        self, acts: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, " batch"]:
        return acts.new_zeros(len(acts))


@dataclass(frozen=True, eq=False)
class Paper(Free):
    """The published projection, which acts on the gradient before Adam. Source: arXiv 2606.18322 §3, as its code has it."""

    name: ClassVar[str] = "paper"
    dictionary: Dictionary
    latents: Int[Tensor, " latents"]

    def __post_init__(self) -> None:
        check_latents(self.dictionary, self.latents)

    @cached_property
    def _columns(self) -> Float[Tensor, "d_model latents"]:
        return self.dictionary.W_enc[:, self.latents].float()

    def gradient(self, gradient: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        A = self._columns.to(gradient.device)
        inner = A.T @ A + RIDGE * torch.eye(A.shape[1], device=A.device)
        return gradient - torch.linalg.solve(inner, A.T @ gradient[..., None]).squeeze(-1) @ A.T


@dataclass(frozen=True, eq=False)
class Exact:
    """δ − QQᵀδ, with Q an orthonormal basis of the clamped latents' encoder columns.

    Dictionaries that normalise their input read its direction (and, for `layer_norm`, its distance from its mean): there
    the part of the activation outside Q is rotated and not lengthened, so that the norm which divides it stays.
    Latents that compete (TopK, groups) keep their pre-activations. Whether the same ones fire is measured by `violation`.
    """

    name: ClassVar[str] = "exact"
    dictionary: Dictionary
    latents: Int[Tensor, " latents"]
    extra: Float[Tensor, "d_model _"] | None = None
    """Further directions that the perturbation may not have a part along."""
    _basis: dict[torch.device, Tensor] = field(default_factory=dict[torch.device, Tensor], init=False, repr=False)

    def __post_init__(self) -> None:
        check_latents(self.dictionary, self.latents)

    def basis(self, device: torch.device) -> Float[Tensor, "d_model rank"]:
        """Q: orthonormal, in fp32."""
        if device not in self._basis:
            columns = [self.dictionary.W_enc[:, self.latents].double()]
            if self.dictionary.norm == "layer_norm":
                columns.append(torch.ones(self.dictionary.d_in, 1, dtype=torch.double))
            if self.extra is not None:
                columns.append(self.extra.double())
            self._basis[device] = orthonormal(torch.cat([one.cpu() for one in columns], 1)).float().to(device)
        return self._basis[device]

    def gradient(self, gradient: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return gradient

    def __call__(
        self, delta: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        Q = self.basis(delta.device)
        free = outside(delta, Q)
        if self.dictionary.norm == "none":
            return free
        own = outside(defended, Q)
        rotated = own + free
        length = own.norm(dim=-1, keepdim=True) / rotated.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return rotated * length - own  # 0 for 0, bit for bit: the length is then 1

    def violation(
        self, acts: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, " batch"]:
        """For latents that compete: by how much a clamped one would have to gain or lose to fire as it did."""
        rule, latents = self.dictionary.nonlinearity, self.latents.to(acts.device)
        if only(rule, latents) is not None:
            return acts.new_zeros(len(acts))
        dictionary = self.dictionary.to(acts.device)
        fired = dictionary.encode_latents(defended, latents) > 0
        pre = dictionary.pre_activations(acts)
        own = pre[..., latents]
        if isinstance(rule, TopKActivation):
            best = pre.topk(min(rule.k + 1, pre.shape[-1]), dim=-1).values
            stay, leave = best[..., rule.k - 1 : rule.k], best[..., rule.k : rule.k + 1]
            if not leave.shape[-1]:
                leave = torch.full_like(stay, torch.inf)
        else:
            stay = leave = _rivals(pre, rule, latents)
        lost, gained = (stay - own).relu(), torch.where(own > 0, (own - leave).relu(), torch.zeros_like(own))
        return torch.where(fired, lost, gained).amax(dim=(1, 2))


def _rivals(pre: Tensor, rule: Nonlinearity, latents: Tensor) -> Tensor:
    """The largest pre-activation in each latent's group, without its own."""
    assert isinstance(rule, GroupMaxActivation)
    size = pre.shape[-1] // rule.groups
    groups = pre.unflatten(-1, (rule.groups, size))[..., latents // size, :]
    own = torch.arange(size, device=pre.device) == (latents % size)[:, None]
    return groups.masked_fill(own, -torch.inf).amax(-1)


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """δ has no part along directions, such as those that a fix removes, so their projections stay."""

    name: ClassVar[str] = "exact"
    directions: Float[Tensor, "n d_model"]

    @cached_property
    def _basis(self) -> Float[Tensor, "d_model rank"]:
        return orthonormal(self.directions.double().T).float()

    def gradient(self, gradient: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return gradient

    def __call__(
        self, delta: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        return outside(delta, self._basis.to(delta.device))

    def violation(
        self, acts: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, " batch"]:
        return acts.new_zeros(len(acts))


def outside(
    delta: Float[Tensor, "batch pos d_model"], Q: Float[Tensor, "d_model rank"]
) -> Float[Tensor, "batch pos d_model"]:
    """The part of δ outside an orthonormal basis. The projection is applied twice, because the first one leaves rounding."""
    once = delta - delta @ Q @ Q.T
    return once - once @ Q @ Q.T


def orthonormal(columns: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_model rank"]:
    """An orthonormal basis of the columns' span. Dependent columns add nothing."""
    left, sizes, _ = torch.linalg.svd(columns / columns.norm(dim=0).clamp_min(1e-30), full_matrices=False)
    return left[:, sizes > RANK * sizes.max()]
