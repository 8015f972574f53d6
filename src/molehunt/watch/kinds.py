"""Kinds of prompt, each held to clean rows of its own: a rate over all traffic says nothing about long or unusual inputs.

Clusters of what a prompt is made of: the mean input embedding of its tokens and the logarithm of their number. Neither
takes a forward pass, so a kind is known before the first score. Within a kind the rate is exact (Mondrian conformal
prediction: Vovk, Lindsay, Nouretdinov & Gammerman, "Mondrian confidence machine", 2003).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

CLUSTERS = 4
"""Looked for among the prompts; the most kinds there can be."""
LENGTH_WEIGHT = 0.25
"""Of the prompt's length beside all of its embedding's coordinates together."""
SMALLEST = 1e-6
"""Scale of a coordinate that never varied."""


@torch.inference_mode()
def prompt_features(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "rows features"]:
    """What each prompt is made of: mean input embedding, log of the length; fp32, on the CPU. Prompts have tokens."""
    weight: Tensor = model.get_input_embeddings().weight  # pyright: ignore
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    flat = torch.tensor([token for prompt in prompts for token in prompt], device=weight.device)
    means = embedding_bag(flat, weight, (lengths.cumsum(0) - lengths).to(weight.device), mode="mean")
    return torch.cat([means.float().cpu(), lengths.log()[:, None]], dim=1)


@dataclass(frozen=True, eq=False)
class PromptKinds:
    """Where a prompt belongs: the kind of the nearest centroid."""

    center: Float[Tensor, " features"]
    scale: Float[Tensor, " features"]
    centroids: Float[Tensor, "centroids features"]
    kind_of: tuple[int, ...]
    """Of each centroid."""

    @classmethod
    def one(cls, features: int) -> "PromptKinds":
        """All prompts are of one kind."""
        return cls(torch.zeros(features), torch.ones(features), torch.zeros(1, features), (0,))

    @classmethod
    def fit(
        cls,
        prompts: Float[Tensor, "rows features"],
        held: Float[Tensor, "held features"],
        *,
        least: int,
        least_held: int,
        seed: int = 0,
    ) -> "PromptKinds":
        """Up to `CLUSTERS` kinds; a cluster with too few rows joins another (see `_joined`).

        Args:
            prompts: rows that are clustered.
            held: rows that only count: what will be calibrated on.
            least: of `prompts` in a kind.
            least_held: of `held` in a kind.
        """
        n, features = prompts.shape
        if not features or n < CLUSTERS:
            return cls.one(features)
        center, scale = prompts.mean(0), prompts.std(0).clamp_min(SMALLEST)
        scale[-1] /= math.sqrt(LENGTH_WEIGHT * max(1, features - 1))
        standard = (prompts - center) / scale
        found, _ = kmeans2(standard.double().numpy(), CLUSTERS, minit="++", rng=np.random.default_rng(seed))
        centroids = torch.from_numpy(found).float()
        apart = cls(center, scale, centroids, tuple(range(CLUSTERS)))
        enough = [
            torch.tensor(apart.of(rows)).bincount(minlength=CLUSTERS) / wanted
            for rows, wanted in ((prompts, least), (held, least_held))
        ]
        kinds = replace(apart, kind_of=_joined(centroids, torch.stack(enough)))
        return kinds if kinds.n > 1 else cls.one(features)

    @property
    def n(self) -> int:
        return max(self.kind_of) + 1

    def of(self, prompts: Float[Tensor, "rows features"]) -> list[int]:
        """The kind of each row."""
        if not len(prompts):
            return []
        standard = (prompts - self.center) / self.scale
        return [self.kind_of[i] for i in torch.cdist(standard, self.centroids).argmin(1).tolist()]


def _joined(
    centroids: Float[Tensor, "centroids features"], enough: Float[Tensor, "wants centroids"]
) -> tuple[int, ...]:
    """The kind of each centroid, numbered from 0, once every kind has enough rows: 1 of everything that is wanted.

    Of the kinds that have too few, the nearest two join; the last one joins its nearest neighbour, whatever its size.
    So what is rare stays apart from what is common for as long as it can.
    """
    groups = [[i] for i in range(len(centroids))]
    apart = torch.cdist(centroids, centroids)

    def few(group: list[int]) -> bool:
        return bool((enough[:, group].sum(1) < 1).any())

    def between(a: list[int], b: list[int]) -> float:
        return float(apart[a][:, b].min())

    while len(groups) > 1 and (small := [group for group in groups if few(group)]):
        others = small if len(small) > 1 else groups
        first, second = min(
            ((a, b) for a in small for b in others if a is not b), key=lambda two: between(two[0], two[1])
        )
        groups.remove(second)
        first.extend(second)
    of = {i: kind for kind, group in enumerate(groups) for i in group}
    return tuple(of[i] for i in range(len(centroids)))
