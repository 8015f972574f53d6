"""Synthetic activations of a model pair: a few of many unit atoms on each token, known to the test."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from molehunt.activation.shuffle import PairBatch


@dataclass(frozen=True, eq=False)
class Planted:
    """Atoms [atoms d] of the difference; the base is noise without structure."""

    atoms: Tensor
    active: int = 3
    noise: float = 0.01
    offset: float = 0.3

    @classmethod
    def of(cls, d: int = 16, atoms: int = 24, seed: int = 4711, **options) -> "Planted":
        rng = torch.Generator().manual_seed(seed)
        return cls(normalize(torch.randn(atoms, d, generator=rng), dim=1), **options)

    def difference(self, n: int, rng: torch.Generator) -> Tensor:
        count, d = self.atoms.shape
        at = torch.rand(n, count, generator=rng).topk(self.active, dim=1).indices
        code = torch.zeros(n, count).scatter(1, at, 0.5 + torch.rand(n, self.active, generator=rng))
        return code @ self.atoms + self.noise * torch.randn(n, d, generator=rng) + self.offset

    def batch(self, n: int, seed: int) -> PairBatch:
        rng = torch.Generator().manual_seed(seed)
        base = torch.randn(n, self.atoms.shape[1], generator=rng)
        return PairBatch(base, base + self.difference(n, rng))

    def batches(self, count: int, n: int = 256, seed: int = 0) -> list[PairBatch]:
        return [self.batch(n, 1000 * seed + i) for i in range(count)]

    def found(self, decoder: Tensor) -> float:
        """Mean over atoms of the best cosine with any row of `decoder`."""
        return float((self.atoms @ normalize(decoder, dim=1).T).amax(1).mean())
