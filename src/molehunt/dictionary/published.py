"""The two dictionaries of arXiv 2605.07324 as its code trains them, for comparison. Use `train` for your own.

Both tie the decoder to the encoder, read raw activations, take no bias off the input, and train 1,000 steps. The "Diff-SAE"
normalises its weights along the wrong axis and averages its L1 penalty over all latents, which makes the code dense; the
"crosscoder" has the 32 largest codes of each row.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from molehunt.dictionary.nonlinearity import TopKActivation

L1 = 1e-4
LR = 1e-4
BATCH = 256
STEPS = 1000


@dataclass(frozen=True, eq=False)
class PublishedDictionary:
    """f = ReLU(W x + b), or its k largest; x̂ = Wᵀ f + b_dec."""

    weight: Float[Tensor, "d_dict d_in"]
    b_enc: Float[Tensor, " d_dict"]
    b_dec: Float[Tensor, " d_in"]
    k: int | None = None

    def encode(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_dict"]:
        pre = torch.addmm(self.b_enc, x, self.weight.mT)
        return pre.relu() if self.k is None else TopKActivation(self.k)(pre)

    def reconstruct(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        return self.encode(x) @ self.weight + self.b_dec


def train_published(
    x: Float[Tensor, "rows d_in"], d_dict: int, *, k: int | None = None, steps: int = STEPS, seed: int = 42
) -> PublishedDictionary:
    """Train on the very rows that will be scored, as published. `steps=0` gives the untrained start.

    Args:
        x: pooled activations: differences for the Diff-SAE, [base, tuned] for the crosscoder.
        d_dict: latents.
        k: number of codes that fire on a row; None for the Diff-SAE.
    """
    rng = torch.Generator().manual_seed(seed)
    d_in = x.shape[1]
    bound = d_in**-0.5  # nn.Linear's own start
    weight = (torch.rand(d_dict, d_in, generator=rng) * 2 - 1) * bound
    if k is None:
        weight = normalize(weight, dim=0)
    parameters = [
        weight.requires_grad_(),
        torch.zeros(d_dict, requires_grad=True),
        torch.zeros(d_in, requires_grad=True),
    ]
    optimiser = torch.optim.Adam(parameters, lr=LR, fused=True)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (min(BATCH, len(x)),), generator=rng)]
        form = PublishedDictionary(parameters[0], parameters[1], parameters[2], k)
        code = form.encode(batch)
        error = batch - (code @ form.weight + form.b_dec)
        loss = error.square().mean() + L1 * code.abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if k is None:
            with torch.no_grad():
                weight.copy_(normalize(weight, dim=0))
    done = [p.detach() for p in parameters]
    return PublishedDictionary(done[0], done[1], done[2], k)
