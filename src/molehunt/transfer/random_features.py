"""A map that bends and is fitted in closed form: ridge on the activations and on random ReLU features of them.

Source: Rahimi & Recht 2008, "Weighted sums of random kitchen sinks"; with ReLU this is the autoencoder of `trained` whose
first layer is drawn and not learnt, wider, and with a linear path beside it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.errors import UsageError
from molehunt.site import Site
from molehunt.transfer.collect import PairActs
from molehunt.transfer.map_file import MapFacts, SavedMap, read_map, write_map
from molehunt.transfer.ridge import ridge
from molehunt.transfer.statistics import CHUNK, GridMoments, PairMoments

KIND = "random-features"
FEATURES = 4
"""Number of features for each dimension of the source. The moments cost (1 + FEATURES)² times those of a plain ridge."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RandomFeatureMap:
    """[acts, ReLU(acts @ projection + offset)] @ weight + bias.

    Law: `RandomFeatureMap.load(map.save(path))` maps as `map` does, bit for bit.
    """

    source: Site
    target: Site
    projection: Float[Tensor, "d_source features"]
    offset: Float[Tensor, " features"]
    weight: Float[Tensor, "d_source_and_features d_target"]
    bias: Float[Tensor, " d_target"]
    facts: MapFacts = field(default_factory=MapFacts)

    def __post_init__(self) -> None:
        d_source, features = self.projection.shape
        shapes = [tuple(tensor.shape) for tensor in (self.offset, self.weight, self.bias)]
        if shapes != [(features,), (d_source + features, self.weight.shape[1]), (self.weight.shape[1],)]:
            raise ValueError(f"a projection {d_source} to {features} and tensors of shapes {shapes} are no map")

    @property
    def widths(self) -> tuple[int, int]:
        """Dimensions of the source and of the target."""
        return self.projection.shape[0], self.weight.shape[1]

    def __call__(self, acts: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d_target"]:
        """Mapped activations, in fp32. Raises UsageError for activations of another width."""
        if acts.shape[-1] != self.widths[0]:
            raise UsageError(
                f"this map is from {self.widths[0]} dimensions at {self.source}; the activations have "
                f"{acts.shape[-1]}.\nGive those of the model that it was fitted to."
            )
        lifted = _lifted(acts, self.projection.to(acts.device), self.offset.to(acts.device))
        return lifted @ self.weight.to(acts.device, torch.float32) + self.bias.to(acts.device, torch.float32)

    def difference(
        self, plus: Float[Tensor, "tokens d"], minus: Float[Tensor, "tokens d"]
    ) -> Float[Tensor, "tokens d_target"]:
        """The image of a difference of activations, f(plus) - f(minus): the map of a difference means nothing here."""
        return self(plus) - self(minus)

    def save(self, path: Path) -> Path:
        """One safetensors file, whole or not at all. Returns `path`."""
        names = ("projection", "offset", "weight", "bias")
        return write_map(path, KIND, self, self.facts, {name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, path: Path) -> "RandomFeatureMap":
        """Read what `save` wrote. Raises InvalidInput for anything else."""
        return read_map(path, cls.of_saved)

    @classmethod
    def of_saved(cls, saved: SavedMap) -> "RandomFeatureMap":
        """Raises ValueError for a map of another kind."""
        if saved.kind != KIND:
            raise ValueError(f"it is a {saved.kind} map, not one of random features")
        return cls(source=saved.source, target=saved.target, facts=saved.facts, **saved.tensors)


def random_features(
    fit: PairActs, held_out: PairActs, *, features: int | None = None, seed: int = 0
) -> RandomFeatureMap:
    """Draw the features, take moments of them in one pass, and solve; the held-out penalty is taken as in `ridge`.

    Each feature is a random direction of the standardised activations, and bends at a random token of `fit`.

    Args:
        fit: activations of the texts to fit to.
        held_out: activations of other texts.
        features: number of features; by default 4 for each dimension of the source.
        seed: seed of directions and tokens.

    Raises:
        NotTestable: fewer tokens than twice the dimensions and features together, or activations that never vary.
    """
    d_source = fit.x.shape[1]
    k = FEATURES * d_source if features is None else features
    rng = torch.Generator().manual_seed(seed)
    spread = fit.x.double().std(0).float()
    scale = torch.where(spread > 0, spread, torch.ones_like(spread))
    directions = torch.randn(d_source, k, generator=rng).to(fit.x.device) / math.sqrt(d_source)
    projection = directions / scale[:, None]
    bends = fit.x[torch.randint(len(fit.x), (k,), generator=rng).to(fit.x.device)].float()
    offset = -(bends * projection.mT).sum(1)

    def lift(x: Tensor) -> Tensor:
        return _lifted(x, projection, offset)

    solved = ridge(_moments(fit, lift, d_source + k), _moments(held_out, lift, d_source + k))
    return RandomFeatureMap(
        source=fit.source_site,
        target=fit.target_site,
        projection=projection.cpu(),
        offset=offset.cpu(),
        weight=solved.weight,
        bias=solved.bias,
        facts=MapFacts(method=f"{solved.facts.method}, on {k} random features", tokens=len(fit.x), models=fit.models),
    )


def _moments(acts: PairActs, lift: Callable[[Tensor], Tensor], width: int) -> PairMoments:
    """Moments of the lifted activations, a piece at a time."""
    found = GridMoments.empty([acts.source_site], [acts.target_site], width, acts.y.shape[1])
    for x, y in zip(acts.x.split(CHUNK), acts.y.split(CHUNK), strict=True):
        found = found.with_tokens(lift(x)[None], y[None])
    return found.pair(acts.source_site, acts.target_site)


def _lifted(
    x: Float[Tensor, "tokens d_source"],
    projection: Float[Tensor, "d_source features"],
    offset: Float[Tensor, " features"],
) -> Float[Tensor, "tokens d_source_and_features"]:
    return torch.cat([x.float(), torch.relu(x.float() @ projection + offset)], 1)
