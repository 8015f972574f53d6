"""Steering vectors of one model made into those of another."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from molehunt.errors import NotTestable, UsageError, printable
from molehunt.steer.vector import SteeringVector, VectorFacts
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.saved import FittedMap
from molehunt.transfer.statistics import PairMoments


def mapped_vector(vector: SteeringVector, map: LinearMap, fit: PairMoments, *, n_layers: int) -> SteeringVector:
    """V W, without the bias, at the length that the target's own activations give it.

    A regression predicts the mean, so what it predicts badly comes out too short. The vector is lengthened by as much as
    the target's activations vary more along it than the mapped ones do.

    Args:
        vector: of the source, with a vector at the map's source block.
        map: from the source's block outputs to the target's.
        fit: the moments that the map was fitted to.
        n_layers: decoder blocks of the target.

    Raises:
        UsageError: the vector is of another block, width or checkpoint than the map's source, or the map is not between
            block outputs.
        NotTestable: the map takes the vector to nothing.
    """
    told = vector.facts
    if {map.source.stream, map.target.stream} != {"resid"}:
        raise UsageError(f"steering vectors act on block outputs; this map is from {map.source} to {map.target}.")
    if map.source.layer not in vector.vectors or told.d_model != map.widths[0]:
        has = ", ".join(str(site) for site in vector.sites)
        raise UsageError(
            f"this map is from {map.source}, {map.widths[0]} dimensions; the vector is of {has}, {told.d_model} dimensions."
        )
    mine, theirs = told.model, map.facts.models.source
    if mine is not None and theirs is not None and mine != theirs:
        raise UsageError(
            f"this map is from another checkpoint ({printable(theirs, 13)}) than the vector's ({printable(mine, 13)}).\n"
            "Fit a map to the models that the vector is to go between."
        )
    source = vector.vectors[map.source.layer][None].float()
    found = map.difference(source, source * 0)[0]
    return SteeringVector({map.target.layer: shrinkage(map, fit, found) * found}, _facts(told, map, n_layers))


def shrinkage(map: LinearMap, fit: PairMoments, along: Float[Tensor, " d_target"]) -> float:
    """Standard deviation of the target's activations along a direction, in units of that of the mapped ones.

    Raises NotTestable where the mapped ones do not vary along it.
    """
    unit = along.double() / along.double().norm()
    through = map.weight.double() @ unit
    mapped, own = through @ fit.source @ through, unit @ fit.target @ unit
    if not bool(mapped > 0):
        raise NotTestable(f"the map from {map.source} to {map.target} takes this vector to nothing")
    return float((own / mapped).sqrt())


def mapped_means(
    map: FittedMap,
    plus: Float[Tensor, " d_source"],
    minus: Float[Tensor, " d_source"],
    facts: VectorFacts,
    *,
    n_layers: int,
) -> SteeringVector:
    """f(plus) − f(minus): the only meaning that a vector has under a map that is not linear; nothing is calibrated.

    Args:
        map: any.
        plus: mean activation of the source with the behaviour, at the map's source.
        minus: without it.
        facts: of a vector of the source that these means make.
        n_layers: decoder blocks of the target.
    """
    found = map.difference(plus[None], minus[None])[0]
    return SteeringVector({map.target.layer: found}, _facts(facts, map, n_layers))


def _facts(told: VectorFacts, map: FittedMap, n_layers: int) -> VectorFacts:
    return replace(
        told,
        method=f"{told.method}, carried over by {map.facts.method}",
        model=map.facts.models.target,
        n_layers=n_layers,
        d_model=map.widths[1],
    )
