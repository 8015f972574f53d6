"""ReLU dictionaries with an L1 penalty on codes in units of decoder norm. Source: Bricken et al. 2023; arXiv 2406.04093."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu

from molehunt.dictionary import nonlinearity
from molehunt.dictionary.code import Pattern, decode_sparse, encode_chosen
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.trainee import Pass, SquaredError, Trainee
from molehunt.errors import UsageError

SPARSE_BELOW = 0.1
"""Share of the codes that fire below which a step on a CPU computes with those alone. Judged by the batch before."""


class ReLU(Trainee):
    """L1 on z·‖decoder‖, so that shrinking z by growing the decoder gains nothing; warmed up over the first tenth."""

    def __init__(self, d_in: int, d_dict: int, *, pairing: Pairing, seed: int, l1: float = 0.02) -> None:
        super().__init__(d_in, d_dict, pairing=pairing, seed=seed)
        if l1 < 0:
            raise UsageError(f"l1 must be 0 or more, got {l1}")
        self.l1 = l1
        self._density = 1.0

    def save_state(self) -> dict[str, float]:
        return {"density": self._density}

    def load_state(self, state: Mapping[str, float]) -> None:
        self._density = state["density"]

    def training_pass(self, x: Float[Tensor, "tokens d_in"], squared_error: SquaredError, progress: float) -> Pass:
        # the norms are one more column of the decoder, so that the size of the codes costs no pass of its own
        decoder = torch.cat([self.decoder, self.decoder_norms()[:, None]], dim=1)
        if self._density < SPARSE_BELOW and x.device.type == "cpu":
            with torch.no_grad():
                pre = self.pre(x)
                pattern = Pattern.of_mask(pre > 0)
            values = encode_chosen(pre, x, self.encoder, self.b_enc, pattern)
            out, fired, fires = decode_sparse(values, decoder, pattern), pattern.fired(), len(values)
        else:
            code = relu(self.pre(x), inplace=True)
            out, fired, fires = code @ decoder, code.amax(0) > 0, int(code.count_nonzero())
        self._density = fires / (len(x) * self.d_dict)
        losses = {
            "reconstruction": squared_error(x - out[:, :-1] - self.b_dec).mean() / self.d_in,
            "sparsity": self.l1 * min(1.0, 10 * progress) * out[:, -1].mean() / self.d_in**0.5,
        }
        return Pass(losses=losses, fired=fired, l0=fires / len(x))

    def nonlinearity(self) -> nonlinearity.ReLUActivation:
        return nonlinearity.ReLUActivation()
