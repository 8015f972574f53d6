"""Joint second moments of two models' activations, in fp64: everything that a closed-form map between them needs.

One pass over text serves every pair of layers, and shards merge to what one pass would have given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from safetensors.torch import load_file, save_file
from torch import Tensor

from molehunt.errors import NotTestable
from molehunt.model.site import Site
from molehunt.run.whole import replace_whole
from molehunt.transfer.linear_map import LinearMap

CHUNK = 8192
"""Tokens that are multiplied at once."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PairMoments:
    """Of activations x at one site and y at another, of the same tokens. Scatters are sums over tokens about the mean."""

    source_site: Site
    target_site: Site
    count: int
    source_mean: Float64[Tensor, " d_source"]
    target_mean: Float64[Tensor, " d_target"]
    source: Float64[Tensor, "d_source d_source"]
    target: Float64[Tensor, "d_target d_target"]
    cross: Float64[Tensor, "d_source d_target"]

    @classmethod
    def of(
        cls,
        source_site: Site,
        target_site: Site,
        x: Float[Tensor, "tokens d_source"],
        y: Float[Tensor, "tokens d_target"],
    ) -> "PairMoments":
        """Of activations at hand, row i of both from the same token."""
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
        )

    def map(self, weight: Float[Tensor, "d_source d_target"]) -> LinearMap:
        """The map with this weight whose bias takes the source's mean to the target's."""
        weight = weight.double()
        return LinearMap(self.source_site, self.target_site, weight, self.target_mean - self.source_mean @ weight)

    def fvu(self, map: LinearMap) -> float:
        """Fraction of the target's variance, each dimension about its own mean, that a map leaves unexplained here.

        Exact for the tokens that these moments are of; no activation is kept for it.
        """
        weight, bias = map.weight.double(), map.bias.double()
        explained = 2 * (weight * self.cross).sum() - (weight * (self.source @ weight)).sum()
        missed = self.target_mean - self.source_mean @ weight - bias
        total = self.target.trace()
        return float((total - explained + self.count * missed.square().sum()) / total)

    def cka(self) -> float:
        """Linear centred kernel alignment. Source: Kornblith et al., arXiv 1905.00414, §3."""
        return float(self.cross.square().sum() / (self.source.norm() * self.target.norm()))

    def svcca(self, kept: float = 0.99) -> float:
        """Mean canonical correlation of the leading components that hold a share `kept` of either variance.

        Source: Raghu et al., arXiv 1706.05806.
        """
        correlations = torch.linalg.svdvals(
            _whitening(self.source, kept).mT @ self.cross @ _whitening(self.target, kept)
        )
        return float(correlations.clamp(0, 1).mean())

    def need(self, tokens: int) -> None:
        """Raises NotTestable with the numbers where these moments are of fewer tokens, or of ones that never vary."""
        if self.count < tokens:
            raise NotTestable(
                f"{self.count} aligned tokens are too few for a map from {len(self.source_mean)} to "
                f"{len(self.target_mean)} dimensions; it takes at least {tokens}.\nGive more text."
            )
        if not bool(self.target.trace() > 0) or not bool(self.source.trace() > 0):
            raise NotTestable(
                f"activations at {self.source_site} or {self.target_site} never vary: nothing can be mapped"
            )


def _whitening(scatter: Float64[Tensor, "d d"], kept: float) -> Float64[Tensor, "d k"]:
    values, vectors = torch.linalg.eigh(scatter)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    share = values.cumsum(0) / values.sum()
    k = int((share < kept).sum()) + 1
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

    @classmethod
    def empty(cls, sources: Sequence[Site], targets: Sequence[Site], d_source: int, d_target: int) -> "GridMoments":
        """Of no token: merging it changes nothing."""

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
        return GridMoments(
            sources=self.sources,
            targets=self.targets,
            count=n,
            source_mean=x_mean.cpu(),
            target_mean=y_mean.cpu(),
            source=(x.mT @ x).cpu(),
            target=(y.mT @ y).cpu(),
            cross=cross.contiguous().cpu(),
        )

    def merge(self, other: "GridMoments") -> "GridMoments":
        """Of both sets together (Chan, Golub & LeVeque 1979). Raises ValueError for other sites."""
        if (self.sources, self.targets) != (other.sources, other.targets):
            raise ValueError("moments of other sites cannot be merged")
        count = self.count + other.count
        if not self.count or not other.count:
            return other if other.count else self
        share = other.count / count
        x, y = other.source_mean - self.source_mean, other.target_mean - self.target_mean
        between = self.count * share
        return GridMoments(
            sources=self.sources,
            targets=self.targets,
            count=count,
            source_mean=self.source_mean + share * x,
            target_mean=self.target_mean + share * y,
            source=self.source + other.source + between * x[:, :, None] * x[:, None],
            target=self.target + other.target + between * y[:, :, None] * y[:, None],
            cross=self.cross + other.cross + between * x[:, None, :, None] * y[None, :, None],
        )

    def pair(self, source: Site, target: Site) -> PairMoments:
        """Of one pair of sites. Raises KeyError for one that was not read."""
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
        )

    def save(self, path: Path) -> None:
        """One shard's moments, whole or not at all."""
        tensors = {name: value.contiguous() for name, value in vars(self).items() if isinstance(value, Tensor)}
        header = {
            "count": str(self.count),
            "sources": " ".join(map(str, self.sources)),
            "targets": " ".join(map(str, self.targets)),
        }
        replace_whole(path, lambda partial: save_file(tensors, partial, header))

    @classmethod
    def load(cls, path: Path) -> "GridMoments":
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            header = file.metadata()
        sources, targets = (tuple(map(Site.parse, header[name].split())) for name in ("sources", "targets"))
        return cls(sources=sources, targets=targets, count=int(header["count"]), **load_file(path))
