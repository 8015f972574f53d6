"""Joint second moments of two models' activations, in fp64: everything that a closed-form map between them needs.

One pass over text serves every pair of layers, and shards merge to what one pass would have given.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from safetensors.torch import save_file
from torch import Tensor

from molehunt.errors import NotTestable, UsageError
from molehunt.run.saved_file import header_and_tensors, reading
from molehunt.run.whole import replace_whole
from molehunt.site import Site
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.map_file import MapFacts, ModelHashes, saved_hashes

SCHEMA = 1
HEADER = "molehunt_moments"
CHUNK = 8192
"""Number of tokens that are multiplied at once."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PairMoments:
    """Moments of activations x at one site and y at another, of the same tokens. Scatters are sums about the mean."""

    source_site: Site
    target_site: Site
    count: int
    source_mean: Float64[Tensor, " d_source"]
    target_mean: Float64[Tensor, " d_target"]
    source: Float64[Tensor, "d_source d_source"]
    target: Float64[Tensor, "d_target d_target"]
    cross: Float64[Tensor, "d_source d_target"]
    models: ModelHashes = field(default_factory=ModelHashes)

    @classmethod
    def of(
        cls,
        source_site: Site,
        target_site: Site,
        x: Float[Tensor, "tokens d_source"],
        y: Float[Tensor, "tokens d_target"],
    ) -> "PairMoments":
        """Moments of activations at hand; row i of both is from the same token."""
        grid = GridMoments.empty([source_site], [target_site], x.shape[1], y.shape[1])
        return grid.with_tokens(x[None], y[None]).pair(source_site, target_site)

    def reversed(self) -> "PairMoments":
        """The same tokens, for maps from target to source."""
        return PairMoments(
            source_site=self.target_site,
            target_site=self.source_site,
            count=self.count,
            source_mean=self.target_mean,
            target_mean=self.source_mean,
            source=self.target,
            target=self.source,
            cross=self.cross.mT,
            models=self.models.reversed(),
        )

    def shuffled(self, seed: int) -> "PairMoments":
        """The control: as if each token of the source stood beside a random one of the target. No token is read again.

        Under a random permutation the cross scatter has mean 0 and covariance Cxx ⊗ Cyy / (n − 1), exactly, and is
        normal in the limit (Hoeffding 1951, "A combinatorial central limit theorem"): it is drawn from that.
        """
        drawn = torch.randn(self.cross.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        cross = _root(self.source) @ drawn @ _root(self.target).mT / math.sqrt(max(self.count - 1, 1))
        return replace(self, cross=cross)

    def map(self, weight: Float[Tensor, "d_source d_target"], method: str = "given") -> LinearMap:
        """The map with this weight whose bias takes the source's mean to the target's."""
        weight = weight.double()
        bias = self.target_mean - self.source_mean @ weight
        facts = MapFacts(method=method, tokens=self.count, models=self.models)
        return LinearMap(self.source_site, self.target_site, weight, bias, facts)

    def fvu(self, map: LinearMap) -> float:
        """Fraction of the target's variance, each dimension about its own mean, that a map leaves unexplained here.

        Exact for the tokens that these moments are of; no activation is needed for it.

        Raises UsageError for a map between spaces of other widths.
        """
        if map.widths != self.cross.shape:
            raise UsageError(
                f"a map from {map.widths[0]} to {map.widths[1]} dimensions cannot be judged on activations of "
                f"{self.cross.shape[0]} and {self.cross.shape[1]}.\nGive moments of the models that it was fitted to."
            )
        weight, bias = map.weight.double(), map.bias.double()
        explained = 2 * (weight * self.cross).sum() - (weight * (self.source @ weight)).sum()
        missed = self.target_mean - self.source_mean @ weight - bias
        total = self.target.trace()
        return float((total - explained + self.count * missed.square().sum()) / total)

    def cka(self) -> float:
        """Linear centred kernel alignment. Source: Kornblith et al., arXiv 1905.00414, §3."""
        return float(self.cross.square().sum() / (self.source.norm() * self.target.norm()))

    def svcca(self, share: float = 0.99) -> float:
        """Mean canonical correlation of the leading components that hold this share of either variance.

        Source: Raghu et al., arXiv 1706.05806.
        """
        return mean_correlation(whitening(self.source, share), self.cross, whitening(self.target, share))

    def need(self, tokens: int) -> None:
        """Raises NotTestable with the numbers: fewer tokens, or activations that never vary or are no numbers."""
        if self.count < tokens:
            raise NotTestable(
                f"{self.count} aligned tokens are too few for a map from {len(self.source_mean)} to "
                f"{len(self.target_mean)} dimensions; it takes at least {tokens}.\nGive more text."
            )
        if not all(bool(scatter.isfinite().all()) for scatter in (self.source, self.target, self.cross)):
            raise NotTestable(
                f"activations at {self.source_site} or {self.target_site} hold values that are no number, or overflow.\n"
                "Read the models in a wider dtype (bf16 or fp32)."
            )
        if not bool(self.target.trace() > 0) or not bool(self.source.trace() > 0):
            raise NotTestable(
                f"activations at {self.source_site} or {self.target_site} never vary: nothing can be mapped"
            )


def _root(scatter: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """R with R Rᵀ = scatter."""
    values, vectors = torch.linalg.eigh(scatter)
    return vectors * values.clamp_min(0).sqrt()


def mean_correlation(
    left: Float64[Tensor, "d_source k"],
    cross: Float64[Tensor, "d_source d_target"],
    right: Float64[Tensor, "d_target m"],
) -> float:
    """Mean canonical correlation of two sites, given their `whitening` and cross scatter."""
    return float(torch.linalg.svdvals(left.mT @ cross @ right).clamp(0, 1).mean())


def whitening(scatter: Float64[Tensor, "d d"], share: float = 0.99) -> Float64[Tensor, "d k"]:
    """Columns that make the leading components uncorrelated and of unit scatter; they hold this share of it."""
    values, vectors = torch.linalg.eigh(scatter)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    reached = values.cumsum(0) / values.sum()
    k = int((reached < share).sum()) + 1
    k = min(k, int((values > 1e-12 * values[0]).sum()))
    return vectors[:, :k] / values[:k].sqrt()


@dataclass(frozen=True, eq=False, kw_only=True)
class GridMoments:
    """`PairMoments` of every source site with every target site."""

    sources: tuple[Site, ...]
    targets: tuple[Site, ...]
    count: int
    source_mean: Float64[Tensor, "sources d_source"]
    target_mean: Float64[Tensor, "targets d_target"]
    source: Float64[Tensor, "sources d_source d_source"]
    target: Float64[Tensor, "targets d_target d_target"]
    cross: Float64[Tensor, "sources targets d_source d_target"]
    models: ModelHashes = field(default_factory=ModelHashes)

    @classmethod
    def empty(
        cls,
        sources: Sequence[Site],
        targets: Sequence[Site],
        d_source: int,
        d_target: int,
        models: ModelHashes | None = None,
    ) -> "GridMoments":
        """Moments of no token: merging them changes nothing."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        s, t = len(sources), len(targets)
        return cls(
            sources=tuple(sources),
            targets=tuple(targets),
            count=0,
            source_mean=zeros(s, d_source),
            target_mean=zeros(t, d_target),
            source=zeros(s, d_source, d_source),
            target=zeros(t, d_target, d_target),
            cross=zeros(s, t, d_source, d_target),
            models=models or ModelHashes(),
        )

    def with_tokens(
        self, x: Float[Tensor, "sources tokens d_source"], y: Float[Tensor, "targets tokens d_target"]
    ) -> "GridMoments":
        """These moments with more tokens: column i of x and of y are of the same token."""
        found = self
        for first in range(0, x.shape[1], CHUNK):
            found = found.merge(self._of(x[:, first : first + CHUNK], y[:, first : first + CHUNK]))
        return found

    def _of(self, x: Tensor, y: Tensor) -> "GridMoments":
        x, y = x.double(), y.double()
        x_mean, y_mean = x.mean(1), y.mean(1)
        x, y = x - x_mean[:, None], y - y_mean[:, None]
        s, n, d_source = x.shape
        t, _, d_target = y.shape
        wide_x, wide_y = x.transpose(0, 1).reshape(n, -1), y.transpose(0, 1).reshape(n, -1)
        cross = (wide_x.mT @ wide_y).reshape(s, d_source, t, d_target).transpose(1, 2)  # one product for all pairs
        return replace(
            self,
            count=n,
            source_mean=x_mean.cpu(),
            target_mean=y_mean.cpu(),
            source=(x.mT @ x).cpu(),
            target=(y.mT @ y).cpu(),
            cross=cross.contiguous().cpu(),
        )

    def merge(self, other: "GridMoments") -> "GridMoments":
        """Moments of both sets together (Chan, Golub & LeVeque 1979). Raises UsageError for other sites or models."""
        if (self.sources, self.targets) != (other.sources, other.targets):
            mine, theirs = (f"{' '.join(map(str, (*g.sources, 'to', *g.targets)))}" for g in (self, other))
            raise UsageError(f"moments of other sites cannot be merged: these are of {mine}, those of {theirs}.")
        if self.models != other.models:
            raise UsageError(
                f"moments of other models cannot be merged: these are of {_hashes_text(self.models)}, those of "
                f"{_hashes_text(other.models)}."
            )
        count = self.count + other.count
        if not self.count or not other.count:
            return other if other.count else self
        share = other.count / count
        x, y = other.source_mean - self.source_mean, other.target_mean - self.target_mean
        between = self.count * share
        return replace(
            self,
            count=count,
            source_mean=self.source_mean + share * x,
            target_mean=self.target_mean + share * y,
            source=self.source + other.source + between * x[:, :, None] * x[:, None],
            target=self.target + other.target + between * y[:, :, None] * y[:, None],
            cross=self.cross + other.cross + between * x[:, None, :, None] * y[None, :, None],
        )

    def pair(self, source: Site, target: Site) -> PairMoments:
        """Moments of one pair of sites. Raises KeyError for a pair that was not read."""
        if source not in self.sources or target not in self.targets:
            raise KeyError(f"{source} to {target} was not read")
        i, j = self.sources.index(source), self.targets.index(target)
        return PairMoments(
            source_site=source,
            target_site=target,
            count=self.count,
            source_mean=self.source_mean[i],
            target_mean=self.target_mean[j],
            source=self.source[i],
            target=self.target[j],
            cross=self.cross[i, j],
            models=self.models,
        )

    def save(self, path: Path) -> Path:
        """One shard's moments, whole or not at all. Returns `path`."""
        tensors = {name: value.contiguous() for name, value in vars(self).items() if isinstance(value, Tensor)}
        header = {
            "schema": SCHEMA,
            "count": self.count,
            "sources": list(map(str, self.sources)),
            "targets": list(map(str, self.targets)),
            "models": asdict(self.models),
        }
        return replace_whole(path, lambda partial: save_file(tensors, partial, {HEADER: json.dumps(header)}))

    @classmethod
    def load(cls, path: Path) -> "GridMoments":
        """Read what `save` wrote, bit for bit. Raises InvalidInput for anything else."""
        with reading(path, "file of moments of Molehunt's"):
            header, tensors = header_and_tensors(path, HEADER)
            if header["schema"] != SCHEMA:
                raise ValueError(f"its schema is {header['schema']}, not {SCHEMA}")
            sources, targets = (tuple(map(Site.parse, header[name])) for name in ("sources", "targets"))
            d_source, d_target = tensors["cross"].shape[2:]
            wanted = cls.empty(sources, targets, d_source, d_target)
            for name, value in vars(wanted).items():
                if isinstance(value, Tensor) and tensors[name].shape != value.shape:
                    raise ValueError(f"{name} is {list(tensors[name].shape)}, not {list(value.shape)}")
            return replace(wanted, count=int(header["count"]), models=saved_hashes(header["models"]), **tensors)


def _hashes_text(models: ModelHashes) -> str:
    """The hashes, short."""
    shown = {name: str(value)[:12] for name, value in asdict(models).items() if value is not None}
    return ", ".join(f"{name.replace('_', ' ')} {value}…" for name, value in shown.items()) or "unnamed models"
