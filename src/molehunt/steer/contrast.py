"""Steering vectors from rows with and without a behaviour, and the random control."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.detect.logistic_probe import LogisticProbe
from molehunt.direction.mean_difference import mean_difference
from molehunt.direction.pca import pca_directions
from molehunt.site import Site
from molehunt.steer.vector import SteeringVector, VectorFacts

Method = Literal["difference in means", "pca", "logistic probe"]


def contrast_vector(
    positive: Mapping[Site, Float[Tensor, "n d_model"]],
    negative: Mapping[Site, Float[Tensor, "m d_model"]],
    *,
    method: Method = "difference in means",
    facts: VectorFacts,
) -> SteeringVector:
    """From rows without a behaviour to rows with it, at every block that both have.

    Each is scaled to the part of the shift of means that lies along it, so that strengths compare between methods.

    - `difference in means`: the shift itself; with as many paired rows this is CAA (arXiv 2312.06681).
    - `pca`: first principal direction of the paired differences, about 0 (arXiv 2310.01405).
    - `logistic probe`: the normal of an L2-regularised logistic regression.

    Args:
        positive: activations of rows with the behaviour, by block output.
        negative: of rows without; paired with those by row for `pca`.
        method: one of the three.
        facts: of the model; what is filled in here is the method and the numbers of rows.

    Raises:
        NotTestable: fewer than two rows of a kind, or no difference (see `direction.mean_difference`).
        ValueError: unequal numbers of rows for `pca`.
    """
    vectors: dict[int, Tensor] = {}
    n = m = 0
    for site in sorted({*positive} & {*negative}):
        a, b = positive[site].float(), negative[site].float()
        n, m = len(a), len(b)
        direction = mean_difference(site, a, b)
        shift = direction.vector * direction.provenance.strength
        vectors[site.layer] = shift if method == "difference in means" else along(_unit(site, a, b, method), shift)
    return SteeringVector(vectors, replace(facts, method=method, positive=n, negative=m))


def along(unit: Float[Tensor, " d_model"], shift: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """The part of a shift of means that lies along a unit vector: how every method's vector gets its length."""
    return (shift @ unit) * unit


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """The control: at the same blocks, random vectors of equal length."""
    rng = torch.Generator().manual_seed(seed)
    drawn = {layer: torch.randn(v.shape, generator=rng) for layer, v in sorted(vector.vectors.items())}
    scaled = {layer: one * (vector.vectors[layer].norm() / one.norm()) for layer, one in drawn.items()}
    return SteeringVector(scaled, replace(vector.facts, method="random, of equal length"))


def _unit(
    site: Site, a: Float[Tensor, "n d_model"], b: Float[Tensor, "m d_model"], method: Method
) -> Float[Tensor, " d_model"]:
    if method == "pca":
        if len(a) != len(b):
            raise ValueError(f"paired differences take as many rows of each kind, got {len(a)} and {len(b)}")
        return pca_directions(site, torch.cat([a - b, b - a]), k=1)[0].vector  # both signs: about 0
    suspect = torch.arange(len(a) + len(b)) < len(a)
    weight = LogisticProbe.fit(site, torch.cat([a, b]), suspect).weight
    return weight / weight.norm()
