"""Strata of prompts, each calibrated on clean rows of its own: a rate over all traffic says nothing about unusual inputs.

Strata are clusters of two features of a prompt: the mean input embedding of its tokens and the logarithm of their number.
Neither needs a forward pass, so the stratum is known before the first score. Within a stratum the rate is exact (Mondrian conformal
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
"""Number of clusters that are searched among the prompts: the most strata there can be."""
LENGTH_WEIGHT = 0.25
"""Weight of the length of a prompt, relative to all coordinates of its embedding together."""
SMALLEST = 1e-6
"""Scale of a coordinate that never varied."""


@torch.inference_mode()
def prompt_features(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "rows features"]:
    """Features of each prompt: mean input embedding and log of the length; fp32, on the CPU. Prompts have tokens."""
    weight: Tensor = model.get_input_embeddings().weight  # pyright: ignore
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    flat = torch.tensor([token for prompt in prompts for token in prompt], device=weight.device)
    means = embedding_bag(flat, weight, (lengths.cumsum(0) - lengths).to(weight.device), mode="mean")
    return torch.cat([means.float().cpu(), lengths.log()[:, None]], dim=1)


@dataclass(frozen=True, eq=False)
class PromptStrata:
    """Assigns a prompt to the stratum of its nearest centroid."""

    center: Float[Tensor, " features"]
    scale: Float[Tensor, " features"]
    centroids: Float[Tensor, "centroids features"]
    stratum_of: tuple[int, ...]
    """Stratum of each centroid."""

    @classmethod
    def one(cls, features: int) -> "PromptStrata":
        """One stratum that all prompts are in."""
        return cls(torch.zeros(features), torch.ones(features), torch.zeros(1, features), (0,))

    @classmethod
    def fit(
        cls,
        prompts: Float[Tensor, "rows features"],
        calibrate: Float[Tensor, "calibrate features"],
        *,
        least: int,
        least_calibrate: int,
        seed: int = 0,
    ) -> "PromptStrata":
        """Fit up to `CLUSTERS` strata; a cluster with too few rows joins another (see `_joined`).

        Args:
            prompts: rows that are clustered.
            calibrate: rows that a stratum will be calibrated on; they are counted and not clustered.
            least: smallest number of `prompts` in a stratum.
            least_calibrate: smallest number of `calibrate` rows in a stratum.
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
            for rows, wanted in ((prompts, least), (calibrate, least_calibrate))
        ]
        strata = replace(apart, stratum_of=_joined(centroids, torch.stack(enough)))
        return strata if strata.n > 1 else cls.one(features)

    @property
    def n(self) -> int:
        """Number of strata."""
        return max(self.stratum_of) + 1

    def of(self, prompts: Float[Tensor, "rows features"]) -> list[int]:
        """The stratum of each row."""
        if not len(prompts):
            return []
        standard = (prompts - self.center) / self.scale
        return [self.stratum_of[i] for i in torch.cdist(standard, self.centroids).argmin(1).tolist()]


def _joined(
    centroids: Float[Tensor, "centroids features"], enough: Float[Tensor, "wants centroids"]
) -> tuple[int, ...]:
    """The stratum of each centroid, numbered from 0, after clusters were merged until every stratum has enough rows.

    Among the strata with too few rows, the nearest two are merged; the last one is merged with its nearest neighbour,
    whatever its size. So rare prompts stay apart from common ones for as long as possible.

    Args:
        enough: rows of each cluster / rows that a stratum needs, for each of the two requirements.
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
    of = {i: stratum for stratum, group in enumerate(groups) for i in group}
    return tuple(of[i] for i in range(len(centroids)))
