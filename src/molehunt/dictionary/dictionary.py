"""A trained dictionary of latents, whichever family it comes from: encode, decode, and what it was trained on."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.dictionary.nonlinearity import GatedActivation, JumpReLUActivation, Nonlinearity, only
from molehunt.dictionary.pairing import Pairing
from molehunt.errors import InvalidInput, UsageError
from molehunt.site import Site

InputNorm = Literal["none", "layer_norm", "constant_norm"]
EPSILON = 1e-5


@dataclass(frozen=True, eq=False, kw_only=True)
class Dictionary:
    """z = σ((norm(x) − center·b_dec) W_enc + b_enc) and x̂ = unnorm(z W_dec + b_dec).

    Files of every family become this one form. d_out differs from d_in only for transcoders.

    Example:
        >>> dictionary = molehunt.load_dictionary("my-sae")  # doctest: +SKIP
        >>> code = dictionary.encode(acts)  # doctest: +SKIP
        >>> error = acts - dictionary.decode(code)  # doctest: +SKIP
    """

    W_enc: Float[Tensor, "d_in d_dict"]
    b_enc: Float[Tensor, " d_dict"]
    W_dec: Float[Tensor, "d_dict d_out"]
    b_dec: Float[Tensor, " d_out"]
    nonlinearity: Nonlinearity
    center: bool = False
    """Whether b_dec is taken off the input before encoding."""
    norm: InputNorm = "none"
    """`layer_norm`: each token to mean 0 and variance 1; `constant_norm`: each token to length √d_in."""
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    """A linear path around the latents, of skip transcoders: x̂ gains x W_skip."""
    pairing: Pairing = field(default_factory=Pairing)
    """How activations of base and tuned become the input."""
    site: Site | None = None
    """Where the activations come from; None when the files do not say."""
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further facts from the files or the training: family, model name, hook name."""

    def __post_init__(self) -> None:
        d_dict = self.W_enc.shape[1]
        shapes = {
            "b_enc": (tuple(self.b_enc.shape), (d_dict,)),
            "W_dec": (tuple(self.W_dec.shape), (d_dict, self.W_dec.shape[-1])),
            "b_dec": (tuple(self.b_dec.shape), (self.W_dec.shape[-1],)),
        }
        if isinstance(self.nonlinearity, JumpReLUActivation):
            shapes["threshold"] = (tuple(self.nonlinearity.threshold.shape), (d_dict,))
        if isinstance(self.nonlinearity, GatedActivation):
            for name in ("b_gate", "r_mag", "b_mag"):
                shapes[name] = (tuple(getattr(self.nonlinearity, name).shape), (d_dict,))
        for name, (got, wanted) in shapes.items():
            if got != wanted:
                raise InvalidInput(f"{name} of the dictionary is {list(got)} and should be {list(wanted)}.")
        k = getattr(self.nonlinearity, "k", 1)
        if not 1 <= k <= d_dict:
            raise InvalidInput(f"k = {k} latents cannot fire out of {d_dict}.")
        if self.center and self.b_dec.shape != (self.d_in,):
            raise InvalidInput(f"b_dec has {len(self.b_dec)} entries and cannot be taken off an input of {self.d_in}.")

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_dict(self) -> int:
        return self.W_enc.shape[1]

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_dict"]:
        """Codes of activations as the model has them, in fp32."""
        return self.encode_latents(x, None)

    def encode_latents(
        self, x: Float[Tensor, "*batch d_in"], latents: Tensor | None
    ) -> Float[Tensor, "*batch latents"]:
        """Codes of some latents (indices), all for None. Latents that do not compete are computed by themselves."""
        alone = None if latents is None else only(self.nonlinearity, latents)
        pre = self.pre_activations(x, None if alone is None else latents)
        code = (alone or self.nonlinearity)(pre.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return code if alone is not None or latents is None else code[..., latents]

    def pre_activations(
        self, x: Float[Tensor, "*batch d_in"], latents: Tensor | None = None
    ) -> Float[Tensor, "*batch latents"]:
        """What the nonlinearity is given, of some latents (indices) or all: (norm(x) − center·b_dec) W_enc + b_enc, in fp32."""
        if x.shape[-1] != self.d_in:
            raise UsageError(f"this dictionary reads {self.d_in} values a token, and was given {x.shape[-1]}.")
        flat, _, _ = _normalised(x.reshape(-1, self.d_in).float(), self.norm)
        if self.center:
            flat = flat - self.b_dec
        columns, bias = (self.W_enc, self.b_enc) if latents is None else (self.W_enc[:, latents], self.b_enc[latents])
        return (flat @ columns + bias).unflatten(0, x.shape[:-1])

    def normalised(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_in"], Float[Tensor, "..."], Float[Tensor, "..."]]:
        """n, mean and scale, in fp32: n is what the encoder reads before centring, and x = n · scale + mean."""
        return _normalised(x.float(), self.norm)

    def decode(
        self, code: Float[Tensor, "*batch d_dict"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Activations that a code stands for. `x` is the input it came from; families that normalise or skip need it.

        Raises:
            UsageError: this dictionary normalises or skips, and `x` was not given.
        """
        out = code @ self.W_dec + self.b_dec
        if self.norm == "none" and self.W_skip is None:
            return out
        if x is None:
            raise UsageError("this dictionary's decoder needs the input, whose scale it gives back; pass x")
        if self.W_skip is not None:
            out = out + x.float() @ self.W_skip
        if self.norm == "none":
            return out
        _, mean, scale = _normalised(x.float(), self.norm)
        return out * scale + mean

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """decode(encode(x))."""
        return self.decode(self.encode(x), x)

    def to(self, device: torch.device | str) -> "Dictionary":
        """The same dictionary on another device."""
        moved = {
            name: value.to(device)
            for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")
            if isinstance(value := getattr(self, name), Tensor)
        }
        nonlinearity = self.nonlinearity
        if isinstance(nonlinearity, JumpReLUActivation):
            nonlinearity = JumpReLUActivation(nonlinearity.threshold.to(device))
        elif isinstance(nonlinearity, GatedActivation):
            nonlinearity = GatedActivation(
                nonlinearity.b_gate.to(device), nonlinearity.r_mag.to(device), nonlinearity.b_mag.to(device)
            )
        return replace(self, **moved, nonlinearity=nonlinearity)


def _normalised(x: Tensor, norm: InputNorm) -> tuple[Tensor, Tensor, Tensor]:
    """The input as the encoder reads it, and the mean and scale that give it back."""
    if norm == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        scale = (x - mean).std(-1, keepdim=True) + EPSILON
        return (x - mean) / scale, mean, scale
    if norm == "constant_norm":
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return x / scale.clamp_min(torch.finfo(x.dtype).tiny), torch.zeros_like(scale), scale
    one = torch.ones(1, device=x.device)
    return x, torch.zeros_like(one), one
