"""Gated dictionaries: which latents fire and how much are two readings of one encoder. Source: arXiv 2404.16014, §3."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from molehunt.dictionary import nonlinearity
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.trainee import InputScale, Pass, SquaredError, Trainee
from molehunt.errors import UsageError


class Gated(Trainee):
    """L1 acts on the gate alone, so it does not shrink the codes. `b_enc` is the gate's bias."""

    def __init__(self, d_in: int, d_dict: int, *, pairing: Pairing, seed: int, l1: float = 0.02) -> None:
        super().__init__(d_in, d_dict, pairing=pairing, seed=seed)
        if l1 < 0:
            raise UsageError(f"l1 must be 0 or more, got {l1}")
        self.l1 = l1
        self.r_mag, self.b_mag = nn.Parameter(torch.zeros(d_dict)), nn.Parameter(torch.zeros(d_dict))

    def training_pass(self, x: Float[Tensor, "tokens d_in"], squared_error: SquaredError, progress: float) -> Pass:
        gate = self.pre(x)
        size = relu((gate - self.b_enc) * self.r_mag.exp() + self.b_mag)
        code = torch.where(gate > 0, size, torch.zeros_like(size))
        error = x - code @ self.decoder - self.b_dec
        open_gate = relu(gate)
        # the gate has no gradient through the code: it learns by reconstructing with a decoder that it cannot move
        rebuilt = open_gate @ self.decoder.detach() + self.b_dec.detach()
        strength = (open_gate @ self.decoder_norms().detach()).mean() / self.d_in**0.5
        losses = {
            "reconstruction": squared_error(error).mean() / self.d_in,
            "gate reconstruction": squared_error(x - rebuilt).mean() / self.d_in,
            "sparsity": self.l1 * min(1.0, 10 * progress) * strength,
        }
        return Pass(losses=losses, fired=(code > 0).any(0), l0=float((code > 0).sum()) / len(x))

    def nonlinearity(self) -> nonlinearity.GatedActivation:
        norms = self.decoder_norms().detach()
        return nonlinearity.GatedActivation(
            (self.b_enc * norms).detach(), self.r_mag.detach().clone(), (self.b_mag * norms).detach()
        )

    @torch.no_grad()
    def finished(self, scale: InputScale) -> Dictionary:
        """As for every trainee; the input's mean moves into both biases, for the gated form has no `b_enc`."""
        folded = super().finished(scale)
        shift = folded.b_enc - self.b_enc * self.decoder_norms()
        form = self.nonlinearity()
        moved = nonlinearity.GatedActivation(form.b_gate + shift, form.r_mag, form.b_mag + shift * form.r_mag.exp())
        return replace(folded, b_enc=torch.zeros_like(folded.b_enc), nonlinearity=moved)
