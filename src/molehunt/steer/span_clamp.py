"""Hold what chosen latents read: encoding the result again gives exactly the targets.

A `Clamp` moves codes along decoder rows, and W_dec W_enc is not the identity. Encoded again, its result is some other
code, so a later reader of the same latents does not see what was set. A `SpanClamp` moves along the encoder columns
themselves, by the smallest step that meets the targets.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from molehunt.contracts import Gate
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import GatedActivation
from molehunt.errors import UsageError
from molehunt.site import Site
from molehunt.steer.add import gated
from molehunt.steer.clamp import check_dictionary, check_latents

SpanMode = Literal["set", "at-most"]
SPAN_MODES: tuple[SpanMode, ...] = get_args(SpanMode)
RANK = 1e-3
"""Singular values of unit columns below this share of the largest count as dependence. A step grows as their inverse."""
TINY = 1e-12


class _ClampSpan(NamedTuple):
    """The quantities that the clamp holds: n @ columns + offset."""

    columns: Float[Tensor, "d_model held"]
    offset: Float[Tensor, " held"]
    lift: Float[Tensor, "held d_model"]
    """Maps changes of these quantities to the least step that makes them, or comes nearest."""
    basis: Float[Tensor, "d_model rank"]
    """An orthonormal basis of what the columns span."""


@dataclass(frozen=True, eq=False)
class SpanClamp:
    """acts + strength · Q R⁻ᵀ (p* − Aᵀ acts − a'), with A = QR the latents' encoder columns and a' their bias.

    At strength 1 the pre-activations are p* when the result is encoded again (in fp32: a narrower dtype rounds), so that
    applying it twice is applying it once. Columns that depend on others meet their targets as nearly as least squares
    can, each in units of its own column's length; `at-most` then settles in a few applications rather than in one.

    Codes follow from pre-activations where latents do not compete. Of those that do (TopK, groups) the pre-activations
    are held all the same: with a target of 0 or less none ever fires, with a positive one a latent fires only where it
    wins against the others, which the step moves too.

    Dictionaries that normalise their input read a direction, so there the part outside the span gives up or takes the
    length that the part inside gains or loses: norm (and mean, for `layer_norm`) stay. Where `at-most` would need more
    than the whole length of a token, it goes as far as that length does.

    Under attack: what is put in at an earlier block is met here, in every pass. What is put in after it, at the same
    site, it never sees; then the attacker is to be held to what it holds, `Exact(dictionary, latents, directions.mT)`,
    or it is applied again at the next block. Gradients pass through it.

    Source: the dual basis of the clamp of arXiv 2606.18322, whose own is not idempotent.
    """

    site: Site
    dictionary: Dictionary
    """A dictionary of one model's activations at this site."""
    latents: Int[Tensor, " latents"]
    """The latents that are held (S)."""
    value: float | int | Float[Tensor, " _"]
    """Target pre-activations p*, one for all latents or one each. Except in gated dictionaries they are the codes."""
    mode: SpanMode = "set"
    """`at-most` changes only what is above its target; a token where nothing is stays as it is, bit for bit."""
    directions: Float[Tensor, "k d_model"] | None = None
    """Further directions that are always set. They read normalised activations where the encoder normalises."""
    held: Float[Tensor, " _"] | None = None
    """Target product of an activation with each of these directions."""
    strength: float | int = 1.0
    """Share of the edit."""
    gate: Gate | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for latents, targets or a dictionary that cannot be held here."""
        check_latents(self.dictionary, self.latents)
        check_dictionary(self.dictionary, self.site)
        value = torch.as_tensor(self.value)
        if value.shape not in ((), self.latents.shape) or not bool(value.isfinite().all()):
            raise UsageError(
                f"a clamp takes one finite value, or one for each of {len(self.latents)} latents, got {self.value}"
            )
        directions, held = self.directions, self.held
        if (directions is None) != (held is None) or (
            directions is not None
            and held is not None
            and (len(held) != len(directions) or directions.shape[1] != self.dictionary.d_in)
        ):
            raise UsageError(
                f"each direction of {self.dictionary.d_in} entries is held at one projection: got directions "
                f"{None if directions is None else list(directions.shape)} and {None if held is None else len(held)} values."
            )
        self._check_reach()

    def _check_reach(self) -> None:
        """A token that is normalised has one length: targets beyond it cannot be met by any activation."""
        wanted = float(((self._targets - self._span.offset) @ self._span.lift).norm())
        if self.dictionary.norm == "none" or self.mode != "set":
            return
        own = (self.dictionary.d_in - (self.dictionary.norm == "layer_norm")) ** 0.5
        if wanted >= own:
            raise UsageError(
                f"this dictionary normalises its input to length {own:.3g} (`{self.dictionary.norm}`), and these targets "
                f"take {wanted:.3g}: no activation reads them.\nGive targets nearer to 0, or hold fewer latents."
            )

    @cached_property
    def _span(self) -> _ClampSpan:
        made, latents = self.dictionary, self.latents.to(self.dictionary.W_enc.device)
        A = made.W_enc[:, latents].double().cpu()
        offset = made.b_enc[latents].double().cpu()
        if made.center:
            offset = offset - made.b_dec.double().cpu() @ A
        more = [] if self.directions is None else [self.directions.mT.double().cpu()]
        if made.norm == "layer_norm":
            more.append(torch.ones(made.d_in, 1, dtype=torch.double))
        columns = torch.cat([A, *more], 1)
        lengths = columns.norm(dim=0)
        if not bool((lengths > 0).all()):
            nothing = int((lengths == 0).nonzero()[0])
            what = (
                f"latent {int(latents[nothing])}" if nothing < len(latents) else f"direction {nothing - len(latents)}"
            )
            raise UsageError(f"{what} reads nothing (its column is 0), so that no activation moves it.")
        left, sizes, right = torch.linalg.svd(columns / lengths, full_matrices=False)
        independent = sizes > RANK * sizes.max()
        basis = left[:, independent]
        lift = (right[independent].mT / sizes[independent]) @ basis.mT / lengths[:, None]
        offset = torch.cat([offset, torch.zeros(columns.shape[1] - len(offset), dtype=torch.double)])
        return _ClampSpan(columns.float(), offset.float(), lift.float(), basis.float())

    @cached_property
    def _targets(self) -> Float[Tensor, " held"]:
        value = torch.as_tensor(self.value, dtype=torch.float32).cpu().expand(len(self.latents))
        more = [] if self.held is None else [self.held.float().cpu()]
        if self.dictionary.norm == "layer_norm":
            more.append(torch.zeros(1))  # the mean, which normalising took off
        return torch.cat([value, *more])

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Raises UsageError for activations of another width than the dictionary's."""
        if self.strength == 0:
            return acts
        if acts.shape[-1] != self.dictionary.d_in:
            raise UsageError(
                f"this dictionary reads {self.dictionary.d_in} values a token, and was given {acts.shape[-1]}."
            )
        columns, offset, lift, basis = (one.to(acts.device) for one in self._span)
        n, _, scale = self.dictionary.normalised(acts)
        change = self._targets.to(acts.device) - n @ columns - offset
        if self.mode == "at-most":
            above, rest = change[..., : len(self.latents)], change[..., len(self.latents) :]
            if self.directions is None:
                rest = torch.zeros_like(rest)  # of a mean that is 0 but for rounding
            change = torch.cat([above.clamp_max(0), rest], -1)
        step = change @ lift
        if self.dictionary.norm != "none":
            step = _turned(n, step, basis)
        return gated(acts, acts.float() + self.strength * scale * step, self.gate)


def _turned(
    n: Float[Tensor, "batch pos d_model"], step: Float[Tensor, "batch pos d_model"], Q: Float[Tensor, "d_model rank"]
) -> Float[Tensor, "batch pos d_model"]:
    """A step inside the span and one outside of it that keep the length of `n` together; 0 where `step` is."""
    along = n @ Q @ Q.mT
    size = n.norm(dim=-1, keepdim=True)
    inside = along + step
    inside = inside * (size / inside.norm(dim=-1, keepdim=True).clamp_min(TINY)).clamp_max(1)
    left = (size.square() - inside.square().sum(-1, keepdim=True)).clamp_min(TINY).sqrt()
    outside = n - along
    turned = inside + outside * (left / outside.norm(dim=-1, keepdim=True).clamp_min(TINY))
    return torch.where((step != 0).any(-1, keepdim=True), turned - n, torch.zeros_like(n))


def pre_activations_of(
    dictionary: Dictionary, latents: Int[Tensor, " latents"], code: Float[Tensor, " latents"]
) -> Float[Tensor, " latents"]:
    """The pre-activations that these codes come from, where the latents fire: the codes but for gated dictionaries."""
    rule = dictionary.nonlinearity
    if isinstance(rule, GatedActivation):
        return (code - rule.b_mag[latents]) / rule.r_mag[latents].exp()
    return code
