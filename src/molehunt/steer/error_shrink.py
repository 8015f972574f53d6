"""Remove what a dictionary does not explain: the part in which post-clamp recovery was found to travel.

Source: inserting reconstructions in the residual stream as a defence, arXiv 2604.18756 (all of the error dropped); the
error's own size and structure, Engels et al., arXiv 2410.14670.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Gate
from molehunt.dictionary.dictionary import Dictionary
from molehunt.direction.pca import PCAFitter
from molehunt.errors import UsageError
from molehunt.site import Site
from molehunt.steer.ablate import orthonormal
from molehunt.steer.add import gated
from molehunt.steer.clamp import check_dictionary


@dataclass(frozen=True, eq=False)
class ErrorShrink:
    """reconstruction + λ · error, with λ = 1 − strength; the benign part of the error may be left whole.

    λ = 1 changes nothing, bit for bit; λ = 0 is the reconstruction. With `components` only the part of the error that
    lies outside of their span, about `mean`, is scaled.

    Under attack, it meets every perturbation at an earlier block, in every pass. A perturbation at its own site after it
    is not met, unless it is applied again at the next block. An attacker who knows it perturbs along decoder rows and
    the components that are left whole; gradients reach both. It holds no latent: put a `SpanClamp` behind it.
    """

    site: Site
    dictionary: Dictionary
    """A dictionary of one model's activations at this site; keep it on the model's device."""
    components: Float[Tensor, "r d_model"] | None = None
    """Rows that span the part of the error that is left whole; they need not be orthonormal."""
    mean: Float[Tensor, " d_model"] | None = None
    """Mean of benign errors; 0 where it is None."""
    strength: float | int = 1.0
    """1 − λ."""
    gate: Gate | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for a dictionary or components that cannot act here."""
        check_dictionary(self.dictionary, self.site)
        for name, given in (("component", self.components), ("mean", self.mean)):
            if given is not None and given.shape[-1] != self.dictionary.d_in:
                raise UsageError(
                    f"a {name} of {given.shape[-1]} entries is no part of activations of {self.dictionary.d_in}."
                )

    @classmethod
    def fit(
        cls,
        site: Site,
        dictionary: Dictionary,
        benign: Float[Tensor, "tokens d_model"],
        rank: int,
        *,
        strength: float | int = 1.0,
        gate: Gate | None = None,
    ) -> "ErrorShrink":
        """Keep the mean and the first `rank` principal components of the errors of benign tokens (the `fit` split).

        Raises NotTestable for fewer than two tokens, or errors that never vary.
        """
        errors = benign.float() - dictionary.to(benign.device).reconstruct(benign)
        fitter = PCAFitter(site).update(errors)
        found = [direction.vector for direction in fitter.directions(rank)]
        return cls(site, dictionary, torch.stack(found) if found else None, fitter.mean.float(), strength, gate)

    @cached_property
    def basis(self) -> Float[Tensor, "rank d_model"] | None:
        """Orthonormal rows."""
        return None if self.components is None else orthonormal(self.components)

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Raises UsageError for activations of another width than the dictionary's."""
        if self.strength == 0:
            return acts
        gone = acts.float() - self.dictionary.to(acts.device).reconstruct(acts)
        if self.mean is not None:
            gone = gone - self.mean.to(acts.device, torch.float32)
        if self.basis is not None:
            basis = self.basis.to(acts.device)
            gone = gone - gone @ basis.mT @ basis
        return gated(acts, acts.float() - self.strength * gone, self.gate)
