"""Which latents of a crosscoder belong to one model alone: by decoder norm, and by whether the other model needs them.

Norms alone mislead: an L1 penalty shrinks a decoder to zero though the model has the concept, or gives the concept to
other latents. Latent scaling measures it on the activations themselves. Source: Minder et al., arXiv 2504.02922.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from molehunt.activation.shuffle import PairBatch
from molehunt.dictionary.code import Pattern
from molehunt.dictionary.dictionary import Dictionary
from molehunt.errors import NotTestable, UsageError
from molehunt.run.progress import Track, silent

BINS: dict[str, tuple[float, float]] = {"base": (0.0, 0.1), "shared": (0.4, 0.6), "tuned": (0.9, 1.0)}
"""Relative norms of latents that count as one model's alone, or as shared; the rest lies between."""
MAX_NU_RECONSTRUCTION, MAX_NU_ERROR = 0.5, 0.2
"""Below both, a latent is the tuned model's alone."""


def relative_norms(dictionary: Dictionary) -> Float[Tensor, " d_dict"]:
    """½(1 + (‖tuned‖ − ‖base‖) / max) of each latent's decoders: 0 is the base's alone, 1 the tuned model's.

    NaN for a latent whose decoders are both zero. Raises UsageError unless the dictionary reads both models.
    """
    base, tuned = (half.norm(dim=1) for half in _decoders(dictionary))
    return 0.5 * (1 + (tuned - base) / torch.maximum(tuned, base))


def norm_bins(relative: Float[Tensor, " d_dict"]) -> dict[str, int]:
    """How many latents lie in each of `BINS`, and how many `between`."""
    counts = {name: int(((relative >= low) & (relative <= high)).sum()) for name, (low, high) in BINS.items()}
    return {**counts, "between": len(relative) - sum(counts.values())}


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentScaling:
    """Best factors β on code × tuned decoder, per latent, to fit what each model holds. NaN where a latent never fired."""

    error_base: Float64[Tensor, " d_dict"]
    """Factors that fit the base's activation minus the reconstruction of it by the other latents."""
    error_tuned: Float64[Tensor, " d_dict"]
    reconstruction_base: Float64[Tensor, " d_dict"]
    """Factors that fit the reconstruction of the base's activation by all latents."""
    reconstruction_tuned: Float64[Tensor, " d_dict"]
    fired: Int[Tensor, " d_dict"]
    """Tokens on which each latent fired."""
    tokens: int

    @property
    def nu_error(self) -> Float64[Tensor, " d_dict"]:
        """β_base/β_tuned: near 1 where the base holds the concept and its decoder was shrunk away."""
        return self.error_base / self.error_tuned

    @property
    def nu_reconstruction(self) -> Float64[Tensor, " d_dict"]:
        """β_base/β_tuned: near 1 where other latents stand for the same concept in the base."""
        return self.reconstruction_base / self.reconstruction_tuned

    def tuned_only(self) -> Bool[Tensor, " d_dict"]:
        """Latents that the base neither needs nor has otherwise; False where one never fired."""
        return (self.nu_reconstruction < MAX_NU_RECONSTRUCTION) & (self.nu_error < MAX_NU_ERROR)


@torch.no_grad()
def latent_scaling(dictionary: Dictionary, batches: Iterable[PairBatch], *, track: Track = silent) -> LatentScaling:
    """β of every latent in one pass; only the latents that fire on a token cost anything beyond encoding.

    β_j(y) = d_j·Σ f_jn y_n / (‖d_j‖² Σ f_jn²), with d_j the tuned decoder for both models.

    Raises:
        UsageError: the dictionary does not read both models, or normalises its input.
        NotTestable: no batch.
    """
    base_decoder, decoder = _decoders(dictionary)
    if dictionary.norm != "none":
        raise UsageError("Latents of a dictionary that normalises its input have no scale of their own to compare.")
    device, d_dict = decoder.device, dictionary.d_dict
    energy = torch.zeros(d_dict, dtype=torch.float64, device=device)
    fired = torch.zeros(d_dict, dtype=torch.long, device=device)
    sums = torch.zeros(4, d_dict, dtype=torch.float64, device=device)
    tokens = 0
    for batch in track(batches, "scaling latents"):
        x = dictionary.pairing.input(batch.base.to(device), batch.tuned.to(device))
        code = dictionary.encode(x)
        built = dictionary.decode(code, x)
        fires = code > 0
        pattern, values = Pattern.of_mask(fires), code[fires].double()
        fired += torch.bincount(pattern.latent, minlength=d_dict)
        energy += torch.bincount(pattern.latent, values.square(), d_dict)
        sought = [*(x - built).chunk(2, dim=1), *built.chunk(2, dim=1)]
        for i, target in enumerate(sought):
            along = _sampled(target, decoder, pattern).double()
            sums[i] += torch.bincount(pattern.latent, values * along, d_dict)
        tokens += len(x)
    if not tokens:
        raise NotTestable("There is no token to scale latents on. Harvest more traffic.")
    sums[0] += energy * (decoder * base_decoder).sum(1)  # what the latent itself reconstructs goes back to the error
    sums[1] += energy * (decoder * decoder).sum(1)
    betas = (sums / (energy * decoder.double().square().sum(1))).masked_fill(fired == 0, torch.nan)
    return LatentScaling(
        error_base=betas[0],
        error_tuned=betas[1],
        reconstruction_base=betas[2],
        reconstruction_tuned=betas[3],
        fired=fired,
        tokens=tokens,
    )


def _sampled(target: Tensor, decoder: Tensor, pattern: Pattern) -> Float[Tensor, " entries"]:
    """Products of target and decoder at the pattern's entries alone."""
    at = pattern.matrix(target.new_zeros(len(pattern.latent)))
    return torch.sparse.sampled_addmm(at, target.contiguous(), decoder.mT, beta=0.0).values()


def _decoders(dictionary: Dictionary) -> tuple[Float[Tensor, "d_dict d"], Float[Tensor, "d_dict d"]]:
    """The decoders of base and tuned."""
    if dictionary.pairing.kind != "both":
        raise UsageError(
            f"Only a crosscoder has a decoder for each model; this dictionary reads {dictionary.pairing.kind}."
        )
    base, tuned = dictionary.W_dec.chunk(2, dim=1)
    return base.contiguous(), tuned.contiguous()
