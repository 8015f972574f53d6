"""Maps trained by gradient, as published: affine, and an autoencoder with one hidden ReLU layer.

Source: arXiv 2503.04429 (T22 and §maps): masked mean squared error alone, AdamW at 1e-4, three epochs; hidden width
√(d_source · d_target). The closed form of `ridge` is what they are held against.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss

from molehunt.errors import NotTestable
from molehunt.model.site import Site

Kind = Literal["affine", "autoencoder"]


@dataclass(frozen=True, kw_only=True)
class TrainedConfig:
    """The published settings."""

    kind: Kind
    lr: float = 1e-4
    epochs: int = 3
    batch: int = 4096
    """Tokens: about 64 sequences (batch 16, accumulated over 4), as there."""
    patience: int = 5
    """Evaluations without gain after which the rate is halved."""
    seed: int = 0


@dataclass(eq=False)
class TrainedMap:
    """A `TransferMap` whose parameters were trained; deterministic given the configuration."""

    source: Site
    target: Site
    net: nn.Module
    history: list[tuple[int, float, float]] = field(default_factory=list[tuple[int, float, float]])
    """Steps done, held-out fraction of variance unexplained (each dimension about its own mean), mean cosine."""

    @torch.inference_mode()
    def __call__(self, acts: Float[Tensor, "tokens d_source"]) -> Float[Tensor, "tokens d_target"]:
        return self.net(acts.float())

    def difference(
        self, plus: Float[Tensor, "tokens d_source"], minus: Float[Tensor, "tokens d_source"]
    ) -> Float[Tensor, "tokens d_target"]:
        """What a difference of activations becomes: f(plus) - f(minus), for a map of a difference means nothing here."""
        return self(plus) - self(minus)


def train_map(
    source: Site,
    target: Site,
    x: Float[Tensor, "tokens d_source"],
    y: Float[Tensor, "tokens d_target"],
    held_out: tuple[Float[Tensor, "held d_source"], Float[Tensor, "held d_target"]],
    config: TrainedConfig,
) -> TrainedMap:
    """Train on the device of `x`, evaluating on `held_out` ten times an epoch.

    Raises NotTestable where training diverges.
    """
    torch.manual_seed(config.seed)
    net = _net(config.kind, x.shape[1], y.shape[1]).to(x.device)
    found = TrainedMap(source, target, net)
    optimiser = torch.optim.AdamW(net.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=config.patience)
    rng = torch.Generator().manual_seed(config.seed)
    done = 0
    per_epoch = math.ceil(len(x) / config.batch)
    every = max(1, per_epoch // 10)
    for _ in range(config.epochs):
        for rows in torch.randperm(len(x), generator=rng).split(config.batch):
            loss = mse_loss(net(x[rows]), y[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            done += 1
            if done % every == 0:
                found.history.append((done, *quality(found, *held_out)))
                schedule.step(found.history[-1][1])
    if not math.isfinite(found.history[-1][1]):
        raise NotTestable(
            f"the {config.kind} map from {source} to {target} diverged; give it a lower rate than {config.lr:g}"
        )
    return found


@torch.inference_mode()
def quality(
    map: TrainedMap, x: Float[Tensor, "tokens d_source"], y: Float[Tensor, "tokens d_target"]
) -> tuple[float, float]:
    """Fraction of variance unexplained, each dimension about its own mean, and mean cosine."""
    mapped = map(x)
    missed = (mapped.double() - y.double()).square().sum() / (y.double() - y.double().mean(0)).square().sum()
    return float(missed), float(cosine_similarity(mapped, y.float(), dim=1).mean())


def _net(kind: Kind, d_source: int, d_target: int) -> nn.Module:
    if kind == "affine":
        return nn.Linear(d_source, d_target)
    hidden = round(math.sqrt(d_source * d_target))
    layers: Sequence[nn.Module] = (nn.Linear(d_source, hidden), nn.ReLU(), nn.Linear(hidden, d_target))
    return nn.Sequential(*layers)
