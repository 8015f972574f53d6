"""A correction that benign activations do not feel: it reads only what they have no variance in.

Source: AlphaSteer, arXiv 2506.07022 (ΔP with P the projection on the null space of benign activations), without its
regression to a refusal direction: the correction is the one that is wrapped.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Gate, Intervention
from molehunt.direction.pca import PCAFitter
from molehunt.errors import NotTestable, UsageError
from molehunt.site import Site
from molehunt.steer.add import gated

LEFT = 1e-6
"""Share of the benign variance that may lie in directions which are not protected."""


@dataclass(frozen=True, eq=False)
class BenignNull:
    """acts + f(acts) − f(b), with f the edit's own step and b the nearest activation on the benign subspace.

    For a linear step W that is W P (acts − mean), with P the projection on what benign activations leave free, so that
    W P H_benign ≈ 0. A constant part cancels: what is wrapped no longer sets a value, it undoes what the unprotected part
    of an activation adds to it. So a `SpanClamp` holds its latents to what the benign part of the activation reads, and
    takes nothing away from a behaviour that lives inside the benign subspace. Check the valid set before a claim.

    Under attack: as the edit inside, which must act after the perturbation's entry (see `experiments.hardened.threat`); besides, all of
    the benign subspace is open to the attacker. Twice the cost of the edit. Differentiable where the edit is.
    """

    correction: Intervention
    """Without a gate, and one that treats each token by itself."""
    mean: Float[Tensor, " d_model"]
    """Mean of benign activations at the site."""
    protected: Float[Tensor, "rank d_model"]
    """Orthonormal rows: the directions in which they vary."""
    gate: Gate | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for an edit with a gate of its own: it might be open for one of two readings alone."""
        if getattr(self.correction, "gate", None) is not None:
            raise UsageError("give the gate to the projected correction, not to the edit inside.")

    @classmethod
    def fit(
        cls,
        correction: Intervention,
        benign: Float[Tensor, "tokens d_model"],
        *,
        left: float = LEFT,
        gate: Gate | None = None,
    ) -> "BenignNull":
        """Protect the eigenvectors of the benign covariance but for the least ones, which hold a share `left` of its trace.

        Args:
            correction: an edit, such as a `SpanClamp`.
            benign: activations at its site (the `fit` split), more than dimensions.
            left: 0 protects every direction that varies; a larger share frees more, and moves benign activations more.
            gate: where it acts.

        Raises:
            NotTestable: no more tokens than dimensions, of which any leave directions free; or all are protected, so
                that nothing would ever be corrected.
        """
        fitter = PCAFitter(correction.site).update(benign)
        d_model = benign.shape[1]
        if fitter.n <= d_model:
            raise NotTestable(
                f"{fitter.n} benign tokens leave directions of {d_model} free by their number alone.\nGive more text."
            )
        values, vectors = torch.linalg.eigh(fitter.scatter)
        rounding = d_model * torch.finfo(torch.float64).eps * values[-1]
        free = (values.clamp_min(0).cumsum(0) <= left * values.sum()) | (values <= rounding)
        if bool(free.all()) or not bool(free.any()):
            raise NotTestable(
                f"{int(free.sum())} of {d_model} directions hold no more than {left:g} of the variance of benign "
                "activations: there is nothing to protect, or no room for a correction.\nAllow a larger share."
            )
        return cls(correction, fitter.mean.float(), vectors[:, ~free].mT.float(), gate)

    @property
    def site(self) -> Site:
        return self.correction.site

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        exact = acts.float()
        edited = self.correction(exact)
        if edited is exact:
            return acts
        mean, rows = self.mean.to(acts.device), self.protected.to(acts.device)
        benign = mean + (exact - mean) @ rows.mT @ rows
        step = (edited - exact) - (self.correction(benign) - benign)
        return gated(acts, exact + step, self.gate)
