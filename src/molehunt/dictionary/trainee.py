"""A dictionary while it is trained: parameters, initialisation, and what every architecture shares.

Inputs arrive centred and scaled, one scale a model (`InputScale`), so that no b_dec has to be taken off them. When training
ends, scale and mean are folded into the weights: a finished dictionary reads activations as the model has them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import Nonlinearity
from molehunt.dictionary.pairing import Pairing
from molehunt.errors import UsageError

SquaredError = Callable[[Tensor], Tensor]
AUX_WEIGHT = 1 / 32
"""Weight of the auxiliary loss of dead latents (Gao et al., arXiv 2406.04093, §A.2)."""


@dataclass(frozen=True, eq=False)
class InputScale:
    """Mean [d_in] and RMS [d_in] (one number per model, repeated) of a dictionary's inputs."""

    mean: Float[Tensor, " d_in"]
    rms: Float[Tensor, " d_in"]

    @classmethod
    def of(cls, x: Float[Tensor, "tokens d_in"], blocks: int) -> "InputScale":
        """From a sample of inputs. Raises UsageError for constant inputs."""
        mean = x.mean(0)
        parts = (x - mean).unflatten(-1, (blocks, -1))
        rms = parts.square().mean((0, 2)).sqrt()
        if not bool((rms > 1e-8).all()):
            raise UsageError(
                "The activations do not vary (RMS about their mean below 1e-8), so there is nothing to train on.\n"
                "Are base and tuned the same model at this site?"
            )
        return cls(mean, rms.repeat_interleave(parts.shape[-1]))

    def __call__(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        return (x - self.mean) / self.rms


@dataclass(frozen=True, eq=False, kw_only=True)
class Pass:
    """What one batch gave: losses to be summed, which latents fired, and how many a token."""

    losses: Mapping[str, Tensor]
    """`reconstruction` is the mean squared error per input dimension; the rest are penalties, weighted."""
    fired: Bool[Tensor, " d_dict"]
    l0: float


class Trainee(nn.Module, ABC):
    """Parameters of a dictionary in training: encoder and decoder [d_dict d_in], rows are latents."""

    dead: Tensor

    def __init__(self, d_in: int, d_dict: int, *, pairing: Pairing, seed: int) -> None:
        """Decoder rows drawn on the sphere, equal for both models of a crosscoder; encoder equal to the decoder."""
        super().__init__()
        if d_in < 1 or d_dict < 1:
            raise UsageError(f"a dictionary needs d_in and d_dict of 1 or more, got {d_in} and {d_dict}")
        self.d_in, self.d_dict, self.pairing = d_in, d_dict, pairing
        rng = torch.Generator().manual_seed(seed)
        rows = torch.randn(d_dict, d_in // pairing.blocks, generator=rng).repeat(1, pairing.blocks)
        mask = pairing.mask(d_in, d_dict)
        if mask is not None:
            rows = rows * mask
        rows = normalize(rows, dim=1)
        self.encoder, self.decoder = nn.Parameter(rows.clone()), nn.Parameter(rows.clone())
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(d_dict)), nn.Parameter(torch.zeros(d_in))
        self.register_buffer("mask", mask)
        self.register_buffer("dead", torch.zeros(d_dict, dtype=torch.bool))

    @abstractmethod
    def training_pass(self, x: Float[Tensor, "tokens d_in"], squared_error: SquaredError, progress: float) -> Pass:
        """Losses on one batch of scaled inputs; `progress` runs from 0 to 1 over the training."""

    @abstractmethod
    def nonlinearity(self) -> Nonlinearity:
        """How the finished dictionary fires, in terms of `pre_scaled` pre-activations."""

    def decoder_norms(self) -> Float[Tensor, " d_dict"]:
        """Norm of each decoder row, summed over the models of a crosscoder (Minder et al., arXiv 2504.02922)."""
        return self.decoder.unflatten(1, (self.pairing.blocks, -1)).norm(dim=-1).sum(-1)

    def pre(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_dict"]:
        """Pre-activations."""
        return torch.addmm(self.b_enc, x, self.encoder.mT)

    def save_state(self) -> dict[str, float]:
        """What the next step depends on besides parameters and buffers."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Restore what `save_state` gave."""

    def after_step(self) -> None:
        """Called after each optimiser step: latents of one model alone stay so."""
        if isinstance(self.mask, Tensor):
            with torch.no_grad():
                self.encoder.mul_(self.mask)
                self.decoder.mul_(self.mask)

    @torch.no_grad()
    def finished(self, scale: InputScale) -> Dictionary:
        """The dictionary on unscaled activations, its codes measured in units of decoder norm.

        Latents are rescaled so that `decoder_norms` become 1: which latents compete with which then no longer depends
        on a hidden factor, and files of other tools can hold it.
        """
        norms = self.decoder_norms().clamp_min(1e-12)
        encoder = self.encoder * norms[:, None] / scale.rms
        return Dictionary(
            W_enc=encoder.mT.contiguous(),
            b_enc=self.b_enc * norms - encoder @ scale.mean,
            W_dec=self.decoder / norms[:, None] * scale.rms,
            b_dec=self.b_dec * scale.rms + scale.mean,
            nonlinearity=self.nonlinearity(),
            pairing=self.pairing,
        )

    def dead_latents_loss(
        self, x: Float[Tensor, "tokens d_in"], error: Float[Tensor, "tokens d_in"], k: int
    ) -> Float[Tensor, ""]:
        """AuxK: the `k` strongest dead latents reconstruct the error, relative to its variance."""
        dead = self.dead.nonzero()[:, 0]
        target = error.detach()
        pre = torch.addmm(self.b_enc[dead], x, self.encoder[dead].mT)
        values, at = pre.relu().topk(min(k, len(dead)), dim=-1, sorted=False)
        code = torch.zeros_like(pre).scatter(-1, at, values)
        missed = (target - code @ self.decoder[dead]).square().sum()
        return AUX_WEIGHT * missed / (target - target.mean(0)).square().sum().clamp_min(1e-12)
