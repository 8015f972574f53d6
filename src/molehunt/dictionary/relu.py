"""ReLU dictionaries with an L1 penalty on codes in units of decoder norm. Source: Bricken et al. 2023; arXiv 2406.04093."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu

from molehunt.dictionary import nonlinearity
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.trainee import Pass, SquaredError, Trainee
from molehunt.errors import UsageError


class ReLU(Trainee):
    """L1 on z·‖decoder‖, so that shrinking z by growing the decoder gains nothing; warmed up over the first tenth."""

    def __init__(self, d_in: int, d_dict: int, *, pairing: Pairing, seed: int, l1: float = 0.02) -> None:
        super().__init__(d_in, d_dict, pairing=pairing, seed=seed)
        if l1 < 0:
            raise UsageError(f"l1 must be 0 or more, got {l1}")
        self.l1 = l1

    def training_pass(self, x: Float[Tensor, "tokens d_in"], squared_error: SquaredError, progress: float) -> Pass:
        code = relu(self.pre(x))
        error = x - code @ self.decoder - self.b_dec
        size = (code @ self.decoder_norms()).mean() / self.d_in**0.5
        losses = {
            "reconstruction": squared_error(error).mean() / self.d_in,
            "sparsity": self.l1 * min(1.0, 10 * progress) * size,
        }
        return Pass(losses=losses, fired=(code > 0).any(0), l0=float((code > 0).sum()) / len(x))

    def nonlinearity(self) -> nonlinearity.ReLU:
        return nonlinearity.ReLU()
