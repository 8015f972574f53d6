"""Set chosen latents of a dictionary, and leave all that it does not explain.

Source: Farrell et al., arXiv 2410.19278, for negative values; the error term kept as in Marks et al., arXiv 2403.19647.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from molehunt.contracts import Gate
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import ReLUActivation
from molehunt.errors import UsageError
from molehunt.site import Site
from molehunt.steer.add import gated

Mode = Literal["set", "scale", "negative-if-active"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, eq=False)
class Clamp:
    """acts + strength · (decode(clamped code) − decode(code)), which at strength 1 is
    decode(clamped code) + (acts − decode(code)).

    Decoders are affine in the code, so that only the chosen latents are decoded: acts + s · (c − z_S) W_dec[S], with s
    the token's own scale where the dictionary normalises its input. Tokens whose codes the mode leaves as they are keep
    every bit.
    """

    site: Site
    dictionary: Dictionary
    """A dictionary of one model's activations at this site. Keep it on the model's device: all competing latents are encoded."""
    latents: Int[Tensor, " latents"]
    """The latents that are clamped (S)."""
    mode: Mode
    """`set`: z → value; `scale`: z → value · z; `negative-if-active`: z → −value where z > 0."""
    value: float | int | Float[Tensor, " _"]
    """One value for all latents, or one each. `set` and `negative-if-active` take it in the units of the codes."""
    strength: float | int = 1.0
    """Share of the edit."""
    gate: Gate | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for latents, a value or a dictionary that cannot be clamped here."""
        check_latents(self.dictionary, self.latents)
        check_dictionary(self.dictionary, self.site)
        value = self.values
        if value.shape not in ((), self.latents.shape) or not bool(value.isfinite().all()):
            raise UsageError(
                f"a clamp takes one finite value, or one for each of {len(self.latents)} latents, got {self.value}"
            )
        if self.mode == "negative-if-active" and bool((value < 0).any()):
            raise UsageError(
                f"`negative-if-active` sets active latents to −value: give it as 0 or more, got {self.value}"
            )

    @cached_property
    def values(self) -> Float[Tensor, "*latents"]:
        """`value` as a tensor."""
        return torch.as_tensor(self.value, dtype=torch.float32)

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Raises UsageError for activations of another width than the dictionary's."""
        if self.strength == 0:
            return acts
        dictionary, latents = self.dictionary.to(acts.device), self.latents.to(acts.device)
        code = dictionary.encode_latents(acts, latents)
        step = written(dictionary, latents, self._clamped(code) - code, acts)
        return gated(acts, acts.float() + self.strength * step, self.gate)

    def _clamped(self, code: Float[Tensor, "batch pos latents"]) -> Float[Tensor, "batch pos latents"]:
        value = self.values.to(code.device)
        match self.mode:
            case "set":
                return value.expand_as(code)
            case "scale":
                return value * code
            case "negative-if-active":
                return torch.where(code > 0, -value, code)


def written(
    dictionary: Dictionary,
    latents: Int[Tensor, " latents"],
    code: Float[Tensor, "*batch latents"],
    x: Float[Tensor, "*batch d_in"],
) -> Float[Tensor, "*batch d_in"]:
    """What some latents with this code write, which is the part of the reconstruction of `x` that is theirs, in its own units.

    Linear in `code`, which need not be that of `x`; exactly 0 where it is 0.
    """
    theirs = replace(
        dictionary,
        W_enc=dictionary.W_enc[:, latents],
        b_enc=dictionary.b_enc[latents],
        W_dec=dictionary.W_dec[latents],
        b_dec=torch.zeros_like(dictionary.b_dec),
        nonlinearity=ReLUActivation(),  # decoding asks for none
    )
    return theirs.decode(code, x) - theirs.decode(torch.zeros_like(code), x)  # without what normalising took off


def check_dictionary(dictionary: Dictionary, site: Site) -> None:
    """Raises UsageError unless it reconstructs the activations of one model, at this site where it names any."""
    _check_writes(dictionary)
    if dictionary.pairing.blocks != 1 or dictionary.pairing.kind == "difference":
        raise UsageError(
            f"this dictionary reads both models (its pairing is `{dictionary.pairing.kind}`), and a clamp sees the "
            "activations of one.\nTrain one with the pairing `tuned`, or make a steering vector of the latent."
        )
    if dictionary.site not in (None, site):
        raise UsageError(f"this dictionary is of {dictionary.site} and cannot be clamped at {site}.")


def _check_writes(dictionary: Dictionary) -> None:
    if dictionary.W_dec.shape[1] != dictionary.d_in or dictionary.W_skip is not None:
        raise UsageError("this is a transcoder: its latents do not write to the activations that it reads.")


def check_latents(dictionary: Dictionary, latents: Int[Tensor, " latents"]) -> None:
    """Raises UsageError unless these are different latents of a dictionary that reconstructs what it reads."""
    _check_writes(dictionary)
    if not len(latents):
        raise UsageError("choose at least one latent.")
    outside = [i for i in latents.tolist() if not 0 <= i < dictionary.d_dict]
    if outside:
        raise UsageError(f"there is no latent {outside[0]}: this dictionary has 0 to {dictionary.d_dict - 1}.")
    if len(latents.unique()) != len(latents):
        raise UsageError(f"a latent is given twice among {len(latents)}; give each once.")
