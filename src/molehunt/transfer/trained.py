"""Maps trained by gradient, as published: affine, and an autoencoder with one hidden ReLU layer.

Source: arXiv 2503.04429 (T22 and §maps): masked mean squared error alone, AdamW at 1e-4, three epochs of 64 texts a step;
hidden width √(d_source · d_target). The closed form of `ridge` is what they are held against.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss

from molehunt.contracts import TransferMap
from molehunt.errors import NotTestable, UsageError
from molehunt.site import Site
from molehunt.transfer.collect import PairActs
from molehunt.transfer.map_file import MapFacts, SavedMap, read_map, write_map

Kind = Literal["affine", "autoencoder"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class TrainedConfig:
    """The published settings."""

    lr: float = 1e-4
    epochs: int = 3
    texts: int = 64
    """Number of texts of one step: a batch of 16, accumulated over 4."""
    evaluations: int = 10
    """Number of evaluations on held-out tokens in each epoch."""
    patience: int = 5
    """Number of evaluations without gain after which the rate is halved."""
    hidden: int | None = None
    """Width of the autoencoder; None is √(d_source · d_target). The authors' own account of it says d_source."""
    seed: int = 0


class Evaluation(NamedTuple):
    """One evaluation while a map is trained; the loss is the mean squared error alone."""

    step: int
    fvu: float
    """Fraction of held-out variance unexplained, each dimension about its own mean."""
    cosine: float
    """Mean over held-out tokens."""
    kl: float | None
    """The value that `monitor` returned; None without a monitor."""


@dataclass(eq=False, kw_only=True)
class TrainedMap:
    """A `TransferMap` whose parameters were trained; deterministic given the configuration.

    Law: `TrainedMap.load(map.save(path))` maps as `map` does, bit for bit.
    """

    kind: Kind
    source: Site
    target: Site
    net: nn.Module
    facts: MapFacts = field(default_factory=MapFacts)
    history: list[Evaluation] = field(default_factory=list[Evaluation])

    @property
    def widths(self) -> tuple[int, int]:
        """Dimensions of the source and of the target."""
        shapes = [parameter.shape for parameter in self.net.parameters() if parameter.ndim == 2]
        return shapes[0][1], shapes[-1][0]

    @torch.no_grad()
    def __call__(self, acts: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d_target"]:
        """Mapped activations, in fp32. Raises UsageError for activations of another width."""
        if acts.shape[-1] != self.widths[0]:
            raise UsageError(
                f"this map is from {self.widths[0]} dimensions at {self.source}; the activations have "
                f"{acts.shape[-1]}.\nGive those of the model that it was trained on."
            )
        return self.net(acts.float())

    def difference(
        self, plus: Float[Tensor, "tokens d"], minus: Float[Tensor, "tokens d"]
    ) -> Float[Tensor, "tokens d_target"]:
        """The image of a difference of activations, f(plus) - f(minus): the map of a difference means nothing here."""
        return self(plus) - self(minus)

    def save(self, path: Path) -> Path:
        """One safetensors file, whole or not at all. Returns `path`."""
        return write_map(path, self.kind, self, self.facts, self.net.state_dict(), history=self.history)

    @classmethod
    def load(cls, path: Path) -> "TrainedMap":
        """Read what `save` wrote. Raises InvalidInput for anything else."""
        return read_map(path, cls.of_saved)

    @classmethod
    def of_saved(cls, saved: SavedMap) -> "TrainedMap":
        """Raises ValueError for a map of another kind, RuntimeError for weights that are not such a net's."""
        if saved.kind not in KINDS:
            raise ValueError(f"it is a {saved.kind} map, not a trained one")
        kind: Kind = "affine" if saved.kind == "affine" else "autoencoder"
        matrices = [tensor for _, tensor in sorted(saved.tensors.items()) if tensor.ndim == 2]
        net = _net(kind, matrices[0].shape[1], matrices[-1].shape[0], matrices[0].shape[0])
        net.load_state_dict(dict(saved.tensors))
        history = [Evaluation(*row) for row in saved.more["history"]]
        return cls(kind=kind, source=saved.source, target=saved.target, net=net, facts=saved.facts, history=history)


def affine(fit: PairActs, held_out: PairActs, config: TrainedConfig | None = None) -> TrainedMap:
    """An affine map; see `train_map`."""
    return train_map("affine", fit, held_out, config)


def autoencoder(fit: PairActs, held_out: PairActs, config: TrainedConfig | None = None) -> TrainedMap:
    """W₂ ReLU(W₁ x + b₁) + b₂; see `train_map`."""
    return train_map("autoencoder", fit, held_out, config)


def train_map(
    kind: Kind,
    fit: PairActs,
    held_out: PairActs,
    config: TrainedConfig | None = None,
    *,
    monitor: Callable[[TrainedMap], float] | None = None,
) -> TrainedMap:
    """Train on the device of the activations.

    Args:
        kind: kind of the net.
        fit: activations of the texts to train on. Sinks and special tokens are not among them (see `collect` and `alignment`).
        held_out: activations of other texts, on which the map is evaluated.
        config: settings; by default the published ones.
        monitor: called with the map at each evaluation; its value is recorded as `kl` and decides nothing. `fidelity.forced_kl`
            makes one.

    Raises:
        NotTestable: training diverges.
    """
    config = config or TrainedConfig()
    torch.manual_seed(config.seed)
    d_source, d_target = fit.x.shape[1], fit.y.shape[1]
    net = _net(kind, d_source, d_target, config.hidden or round(math.sqrt(d_source * d_target))).to(fit.x.device)
    facts = MapFacts(method=f"{kind} by AdamW", tokens=len(fit.x), models=fit.models)
    found = TrainedMap(kind=kind, source=fit.source_site, target=fit.target_site, net=net, facts=facts)
    optimiser = torch.optim.AdamW(net.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=config.patience)
    rng = torch.Generator().manual_seed(config.seed)
    texts = _texts(fit)
    every = max(1, math.ceil(len(texts) / config.texts) // config.evaluations)
    done = 0
    for _ in range(config.epochs):
        for some in torch.randperm(len(texts), generator=rng).split(config.texts):
            tokens = torch.cat([texts[i] for i in some.tolist()]).to(fit.x.device)
            loss = mse_loss(net(fit.x[tokens]), fit.y[tokens])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            done += 1
            if done % every == 0:
                kl = monitor(found) if monitor else None
                found.history.append(Evaluation(done, *quality(found, held_out), kl))
                schedule.step(found.history[-1].fvu)
    if not math.isfinite(found.history[-1].fvu):
        raise NotTestable(
            f"the {kind} map from {found.source} to {found.target} diverged; give it a lower rate than {config.lr:g}"
        )
    net.requires_grad_(False)
    return found


def quality(map: TransferMap, held_out: PairActs) -> tuple[float, float]:
    """Fraction of variance unexplained, each dimension about its own mean, and mean cosine."""
    mapped, y = map(held_out.x), held_out.y
    missed = (mapped.double() - y.double()).square().sum() / (y.double() - y.double().mean(0)).square().sum()
    return float(missed), float(cosine_similarity(mapped, y.float(), dim=1).mean())


def _texts(acts: PairActs) -> Sequence[Tensor]:
    """Token numbers of each text."""
    order = torch.argsort(acts.row, stable=True).cpu()
    return order.split(torch.unique(acts.row, return_counts=True)[1].tolist())


def _net(kind: str, d_source: int, d_target: int, hidden: int) -> nn.Module:
    if kind == "affine":
        return nn.Linear(d_source, d_target)
    return nn.Sequential(nn.Linear(d_source, hidden), nn.ReLU(), nn.Linear(hidden, d_target))
