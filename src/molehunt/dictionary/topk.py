"""TopK dictionaries: exactly k latents fire on a token. Source: Gao et al., arXiv 2406.04093, §2.3."""

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.dictionary import nonlinearity
from molehunt.dictionary.code import Pattern, decode_sparse, encode_chosen
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.trainee import Pass, SquaredError, Trainee
from molehunt.errors import UsageError


class TopK(Trainee):
    """The k latents largest in units of decoder norm fire; dead ones learn from the error."""

    def __init__(self, d_in: int, d_dict: int, *, pairing: Pairing, seed: int, k: int = 32) -> None:
        super().__init__(d_in, d_dict, pairing=pairing, seed=seed)
        if not 1 <= k <= d_dict:
            raise UsageError(f"k must lie in 1..d_dict={d_dict}, got {k}")
        self.k = k

    def training_pass(self, x: Float[Tensor, "tokens d_in"], squared_error: SquaredError, progress: float) -> Pass:
        with torch.no_grad():
            pre = self.pre(x)
            latents = (pre * self.decoder_norms()).topk(self.k, dim=-1, sorted=False).indices.sort(-1).values
        pattern = Pattern.of_rows(latents, self.d_dict)
        values = encode_chosen(pre, x, self.encoder, self.b_enc, pattern).relu()
        error = x - decode_sparse(values, self.decoder, pattern) - self.b_dec
        losses = {"reconstruction": squared_error(error).mean() / self.d_in}
        if self.dead.any():
            losses["dead latents"] = self.dead_latents_loss(x, error, self.d_in // 2)
        fired = torch.zeros(self.d_dict, dtype=torch.bool, device=x.device)
        fired[pattern.latent[values.detach() > 0]] = True
        return Pass(losses=losses, fired=fired, l0=float((values > 0).sum()) / len(x))

    def nonlinearity(self) -> nonlinearity.TopKActivation:
        return nonlinearity.TopKActivation(self.k)
