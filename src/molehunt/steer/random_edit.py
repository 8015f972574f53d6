"""The control of every intervention: an edit of the same size at every token, in a random direction."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from molehunt.contracts import Intervention
from molehunt.site import Site


@dataclass(frozen=True, eq=False)
class RandomEdit:
    """Changes each token as much as `inner` would, along one fixed random direction instead.

    What a behaviour loses under this is what any disturbance of that size costs.
    """

    inner: Intervention
    direction: Float[Tensor, " d_model"]
    """Unit vector."""

    @classmethod
    def like(cls, inner: Intervention, d_model: int, seed: int) -> "RandomEdit":
        """A random edit as large as `inner`'s, its direction drawn from `seed`."""
        rng = torch.Generator().manual_seed(seed)
        return cls(inner, normalize(torch.randn(d_model, generator=rng), dim=0))

    @property
    def site(self) -> Site:
        return self.inner.site

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        edited = self.inner(acts)
        if edited is acts:
            return acts
        distance = (edited.float() - acts.float()).norm(dim=-1, keepdim=True)
        return (acts.float() + distance * self.direction.to(acts.device)).to(acts.dtype)
