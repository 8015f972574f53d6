"""BatchTopK dictionaries: k latents a token on average, chosen over the whole batch. Source: arXiv 2412.06410."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.dictionary import nonlinearity
from molehunt.dictionary.code import Pattern, decode_sparse, encode_chosen, largest_in_batch
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.trainee import Pass, SquaredError, Trainee
from molehunt.errors import UsageError

THRESHOLD_FROM = 0.5
"""Part of the training after which the inference threshold is tracked: before it, k and weights still move fast."""
THRESHOLD_SPAN = 0.05
"""Part of the training over which the inference threshold is averaged: fewer batches where all of it takes few."""


class BatchTopK(Trainee):
    """The k·tokens largest codes of a batch fire, in units of decoder norm; after training a threshold replaces the batch.

    For a crosscoder this is the recipe of Minder et al. (arXiv 2504.02922): norms summed over the models, k annealed.
    """

    threshold: Tensor

    def __init__(
        self, d_in: int, d_dict: int, *, pairing: Pairing, seed: int, k: int = 32, start_k: int | None = None
    ) -> None:
        """`start_k` is where k starts; it falls to `k` over the first fifth of the training. By default 2k."""
        super().__init__(d_in, d_dict, pairing=pairing, seed=seed)
        if not 1 <= k <= d_dict:
            raise UsageError(f"k must lie in 1..d_dict={d_dict}, got {k}")
        self.k, self.start_k = k, min(2 * k if start_k is None else start_k, d_dict)
        self.register_buffer("threshold", torch.zeros(()))
        self._floor, self._tracked = 0.0, 0.0

    def save_state(self) -> dict[str, float]:
        return {"floor": self._floor, "tracked": self._tracked}

    def load_state(self, state: Mapping[str, float]) -> None:
        self._floor, self._tracked = state["floor"], state["tracked"]

    def k_at(self, progress: float) -> float:
        """Latents a token at this point of the training."""
        return self.k + max(0.0, 1 - 5 * progress) * (self.start_k - self.k)

    def chosen(self, x: Float[Tensor, "tokens d_in"], progress: float) -> tuple[Pattern, Float[Tensor, " entries"]]:
        """Which latents fire on a batch, and their codes."""
        with torch.no_grad():
            pre = self.pre(x)
            n = round(self.k_at(progress) * len(x))
            fires, cut = largest_in_batch(pre * self.decoder_norms(), n, self._floor)
            self._floor = 0.8 * cut  # cuts of neighbouring batches are alike
            decay = math.exp((self._tracked - progress) / THRESHOLD_SPAN) if self._tracked else 0.0
            self.threshold.mul_(decay).add_((1 - decay) * cut)
            self._tracked = progress if progress >= THRESHOLD_FROM else 0.0
        pattern = Pattern.of_mask(fires)
        return pattern, encode_chosen(pre, x, self.encoder, self.b_enc, pattern)

    def training_pass(self, x: Float[Tensor, "tokens d_in"], squared_error: SquaredError, progress: float) -> Pass:
        pattern, values = self.chosen(x, progress)
        error = x - decode_sparse(values, self.decoder, pattern) - self.b_dec
        losses = {"reconstruction": squared_error(error).mean() / self.d_in}
        if self.dead.any():
            losses["dead latents"] = self.dead_latents_loss(x, error, self.d_in // 2)
        return Pass(losses=losses, fired=pattern.fired(), l0=len(values) / len(x))

    def nonlinearity(self) -> nonlinearity.JumpReLUActivation:
        threshold = self.threshold.expand(self.d_dict).clone()
        return nonlinearity.JumpReLUActivation(threshold)
