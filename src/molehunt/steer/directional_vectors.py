"""Steering vectors along a direction that something else found: a weight difference, or a latent of a dictionary.

A direction says where to steer and not how far. Singular values are in units of the weights and codes in units of the
dictionary, so both vectors take their length from activations, as those of `SteeringVector.fit` do: strength 1 is the
shift from rows without a behaviour to rows with it.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.dictionary.dictionary import Dictionary
from molehunt.direction.direction import Directions
from molehunt.direction.mean_difference import mean_difference
from molehunt.errors import NotTestable, UsageError
from molehunt.site import Site
from molehunt.steer.clamp import check_latents, written
from molehunt.steer.contrast import along
from molehunt.steer.vector import SteeringVector, VectorFacts


def weight_vector(
    directions: Directions,
    layer: int,
    positive: Float[Tensor, "n d_model"],
    negative: Float[Tensor, "m d_model"],
    *,
    rank: int = 0,
    facts: VectorFacts,
) -> SteeringVector:
    """A vector along what a fine-tune made one matrix of this block write, as long as the shift of means along it.

    Args:
        directions: directions of a matrix that writes to the residual stream: an attention's output or an MLP's down projection.
        layer: the matrix's block.
        positive: activations of rows with the behaviour, at the block's output.
        negative: activations of rows without it.
        rank: number of the direction; 0 is the strongest.
        facts: facts about the model; the method and the numbers of rows are filled in here.

    Raises:
        NotTestable: the matrix has no direction above its noise; or fewer than two rows of a kind, or no difference.
        UsageError: it has fewer directions, or writes another width than the model's.
    """
    found = len(directions.strength)
    if not found:
        raise NotTestable(
            "this matrix changed in no direction above its rounding noise, so there is nothing to steer along."
        )
    if not 0 <= rank < found:
        raise UsageError(f"there is no direction #{rank}: this matrix has #0 to #{found - 1}.")
    width = directions.write.shape[1]
    if width != positive.shape[1]:
        raise UsageError(
            f"this matrix writes {width} values and the residual stream has {positive.shape[1]}: take one that writes to it."
        )
    shift = mean_difference(Site(layer), positive, negative)
    vector = along(directions.write[rank].float(), shift.vector * shift.provenance.strength)
    return _vector(layer, vector, f"weight direction #{rank}", len(positive), len(negative), facts)


@torch.no_grad()
def latent_vector(
    dictionary: Dictionary,
    latent: int,
    layer: int,
    positive: Float[Tensor, "n d_in"],
    negative: Float[Tensor, "m d_in"],
    *,
    facts: VectorFacts,
) -> SteeringVector:
    """The mean difference of what a latent writes in rows with a behaviour and in rows without.

    Without normalisation that is its decoder row times the difference of its mean codes.

    Args:
        dictionary: a dictionary of this block's output. From one that reads both models the vector is the tuned model's half.
        latent: number of the latent.
        layer: the block.
        positive: inputs of the dictionary (see `Pairing.input`) from rows with the behaviour.
        negative: inputs from rows without it.
        facts: see `weight_vector`.

    Raises:
        NotTestable: no row of a kind, or the latent writes as much in both.
        UsageError: no such latent, a transcoder, or a dictionary of another site.
    """
    chosen = torch.tensor([latent], device=dictionary.W_dec.device)
    check_latents(dictionary, chosen)
    if dictionary.site not in (None, Site(layer)):
        raise UsageError(f"this dictionary is of {dictionary.site}, and steering vectors act on {Site(layer)}.")
    if not len(positive) or not len(negative):
        raise NotTestable(f"a difference takes rows of both kinds, got {len(positive)} and {len(negative)}.")

    def mean(rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, " d_in"]:
        x = rows.to(dictionary.W_dec.device)
        return written(dictionary, chosen, dictionary.encode_latents(x, chosen), x).mean(0).cpu()

    vector = (mean(positive) - mean(negative)).chunk(dictionary.pairing.blocks)[-1]
    return _vector(layer, vector, f"dictionary latent #{latent}", len(positive), len(negative), facts)


def _vector(
    layer: int, vector: Float[Tensor, " d_model"], method: str, positive: int, negative: int, facts: VectorFacts
) -> SteeringVector:
    if not bool(vector.isfinite().all() & vector.any()):
        raise NotTestable(f"{method}: rows with the behaviour and rows without it do not differ along it.")
    return SteeringVector({layer: vector}, replace(facts, method=method, positive=positive, negative=negative))
