"""Matryoshka dictionaries: every prefix of the latents is a dictionary of its own. Source: arXiv 2503.17547."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.dictionary.batch_topk import BatchTopK
from molehunt.dictionary.code import Pattern, decode_sparse
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.trainee import Pass, SquaredError
from molehunt.errors import UsageError


class Matryoshka(BatchTopK):
    """A BatchTopK code whose nested prefixes must each reconstruct; the losses are averaged."""

    def __init__(
        self,
        d_in: int,
        d_dict: int,
        *,
        pairing: Pairing,
        seed: int,
        k: int = 32,
        start_k: int | None = None,
        prefixes: Sequence[float] = (1 / 16, 1 / 4, 1.0),
    ) -> None:
        """`prefixes` are shares of d_dict in ascending order, the last one 1."""
        super().__init__(d_in, d_dict, pairing=pairing, seed=seed, k=k, start_k=start_k)
        self.widths = [max(1, round(share * d_dict)) for share in prefixes]
        if self.widths != sorted(set(self.widths)) or self.widths[-1] != d_dict:
            raise UsageError(f"prefixes must rise to 1, got {list(prefixes)}")

    def training_pass(self, x: Float[Tensor, "tokens d_in"], squared_error: SquaredError, progress: float) -> Pass:
        pattern, values = self.chosen(x, progress)
        built, before, total = self.b_dec.expand(len(x), -1), 0, torch.zeros((), device=x.device)
        for width in self.widths:
            inside = (pattern.latent >= before) & (pattern.latent < width)
            count = torch.bincount(pattern.token[inside], minlength=len(x))
            part = Pattern(torch.cat([count.new_zeros(1), count.cumsum(0)]), pattern.latent[inside], self.d_dict)
            built = built + decode_sparse(values[inside], self.decoder, part)
            total = total + squared_error(x - built).mean() / self.d_in
            before = width
        losses = {"reconstruction": total / len(self.widths)}
        if self.dead.any():
            losses["dead latents"] = self.dead_latents_loss(x, x - built, self.d_in // 2)
        return Pass(losses=losses, fired=pattern.fired(), l0=len(values) / len(x))
