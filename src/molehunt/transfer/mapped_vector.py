"""Steering vectors of one model made into those of another."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from molehunt.errors import NotTestable, UsageError, printable
from molehunt.steer.vector import SteeringVector, VectorFacts
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.saved import FittedMap
from molehunt.transfer.statistics import PairMoments
from molehunt.transfer.trained import TrainedMap


def mapped_vector(vector: SteeringVector, map: LinearMap, fit: PairMoments, *, n_layers: int) -> SteeringVector:
    """V W, without the bias, at the length that the target's own activations give it.

    A regression predicts the mean, so what it predicts badly comes out too short. The vector is lengthened by as much as
    the target's activations vary more along it than the mapped ones do.

    Args:
        vector: a vector of the source that acts on the map's source block.
        map: a map from the source's block outputs to the target's.
        fit: the moments that the map was fitted to.
        n_layers: number of decoder blocks of the target.

    Raises:
        UsageError: the vector is of another block, width or checkpoint than the map's source, or the map is not between
            block outputs.
        NotTestable: the map takes the vector to nothing.
    """
    facts = vector.facts
    if {map.source.stream, map.target.stream} != {"resid"}:
        raise UsageError(f"steering vectors act on block outputs; this map is from {map.source} to {map.target}.")
    if map.source.layer not in vector.vectors or facts.d_model != map.widths[0]:
        has = ", ".join(str(site) for site in vector.sites)
        raise UsageError(
            f"this map is from {map.source}, {map.widths[0]} dimensions; the vector is of {has}, {facts.d_model} "
            f"dimensions.\n{_advice(vector, map)}"
        )
    mine, theirs = facts.model, map.facts.models.source
    if mine is not None and theirs is not None and mine != theirs:
        raise UsageError(
            f"this map is from another checkpoint ({printable(theirs, 13)}) than the vector's ({printable(mine, 13)}).\n"
            "Fit a map to the models that the vector is to go between."
        )
    source = vector.vectors[map.source.layer][None].float()
    found = map.difference(source, source * 0)[0]
    return SteeringVector({map.target.layer: shrinkage(map, fit, found) * found}, _facts(facts, map, n_layers))


def shrinkage(map: LinearMap, fit: PairMoments, along: Float[Tensor, " d_target"]) -> float:
    """Standard deviation of the target's activations along a direction, over that of the mapped activations.

    Raises NotTestable where the mapped activations do not vary along it.
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
        map: a map of any kind.
        plus: mean activation of the source with the behaviour, at the map's source.
        minus: mean activation without it.
        facts: facts about a vector of the source that these means make.
        n_layers: number of decoder blocks of the target.
    """
    found = map.difference(plus[None], minus[None])[0]
    return SteeringVector({map.target.layer: found}, _facts(facts, map, n_layers))


def linear_part(map: FittedMap) -> LinearMap:
    """The map as a matrix and a constant. Raises UsageError for one that is not affine: no vector has an image under it."""
    if isinstance(map, LinearMap):
        return map
    if isinstance(map, TrainedMap) and isinstance(map.net, nn.Linear):
        return LinearMap(map.source, map.target, map.net.weight.detach().mT, map.net.bias.detach(), map.facts)
    raise UsageError(
        f"a vector can be carried by an affine map alone, and this one is {map.facts.method}.\n"
        "Fit a map with --map ridge; a map that is not affine can only replace activations."
    )


def _advice(vector: SteeringVector, map: LinearMap) -> str:
    if vector.facts.d_model != map.widths[0]:
        return "Fit a map from the model that the vector was fitted to."
    layers = sorted(vector.vectors)
    if len(layers) == 1:
        return f"Fit a map with `transfer fit --from-layer {layers[0]}`."
    listed = ", ".join(str(layer) for layer in layers[:-1])
    return f"Fit a map with `transfer fit --from-layer N`, where N is {listed} or {layers[-1]}."


def _facts(facts: VectorFacts, map: FittedMap, n_layers: int) -> VectorFacts:
    return replace(
        facts,
        method=f"{facts.method}, carried over by {map.facts.method}",
        model=map.facts.models.target,
        n_layers=n_layers,
        d_model=map.widths[1],
    )
