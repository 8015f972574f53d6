"""Train many dictionaries in one pass over activations. Each sees every batch of its site; all resume to the same result."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from molehunt.activation.shuffle import PairBatch
from molehunt.dictionary.catalog import CATALOG
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.trainee import InputScale, Trainee
from molehunt.errors import InvalidInput, NotTestable, UsageError
from molehunt.run.catalog import load
from molehunt.run.progress import Track, silent
from molehunt.run.unit import canonical_json
from molehunt.run.whole import replace_whole
from molehunt.site import Site

log = logging.getLogger(__name__)
Source: TypeAlias = Iterable[PairBatch] | Callable[[int], Iterable[PairBatch]]
"""Batches, or a function from a number of batches to those that follow them."""
GROUP = "molehunt.dictionaries"
"""Entry points of plugins that offer architectures."""
DEAD_AFTER = 10_000_000
"""Tokens without firing after which a latent counts as dead; a tenth of shorter trainings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DictionarySpec:
    """One dictionary to be trained."""

    site: Site
    architecture: str = "batch-topk"
    pairing: Pairing = field(default_factory=lambda: Pairing(kind="difference"))
    expansion: int = 16
    """Latents per dimension of the model."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the architecture takes besides: k, l1, target_l0, …"""
    lr: float | None = None
    """Peak learning rate; None takes 2e-4·√(2¹⁴/d_dict), the rule of arXiv 2406.04093."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.expansion < 1:
            raise UsageError(f"expansion must be 1 or more, got {self.expansion}")

    @property
    def name(self) -> str:
        """Short and unique among specs that differ in these."""
        pairing = self.pairing.kind if not self.pairing.joint else f"joint{self.pairing.joint:g}"
        extra = f"-x{self.pairing.exclusive:g}" if self.pairing.exclusive else ""
        settings = "".join(f"-{key}{value}" for key, value in sorted(self.settings.items()))
        return f"{self.architecture}-{pairing}{extra}-{self.site}-{self.expansion}x{settings}-s{self.seed}"

    def to_json(self) -> dict[str, Any]:
        return {
            "site": str(self.site),
            "architecture": self.architecture,
            "pairing": self.pairing.to_json(),
            "expansion": self.expansion,
            "settings": dict(self.settings),
            "lr": self.lr,
            "seed": self.seed,
        }

    def build(self, d_model: int) -> Trainee:
        """The untrained dictionary. Raises UsageError for settings the architecture does not take."""
        made = cast("Any", load(CATALOG, self.architecture, GROUP))
        d_dict = self.expansion * d_model
        try:
            return made(d_model * self.pairing.blocks, d_dict, pairing=self.pairing, seed=self.seed, **self.settings)
        except TypeError as error:
            raise UsageError(f"{self.architecture} does not take these settings: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """What all dictionaries of one pass share."""

    steps: int
    batch: int = 2048
    """Number of tokens of each step."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises; over the last fifth it falls to 0."""
    clip: float = 1.0
    """Greatest gradient norm."""
    autocast: bool = False
    """Dense products in bf16."""
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise UsageError(f"training needs steps and batch of 1 or more, got {self.steps} and {self.batch}")


@dataclass(eq=False)
class _Running:
    """A dictionary in training with all that its next step depends on."""

    spec: DictionarySpec
    trainee: Trainee
    scale: InputScale
    optimiser: torch.optim.Adam
    lr: float
    idle: Tensor
    """Tokens since each latent last fired."""
    history: list[dict[str, int | float]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """A finished dictionary and how its training went."""

    spec: DictionarySpec
    dictionary: Dictionary
    history: Sequence[Mapping[str, int | float]]
    """Per logged step: step, each loss, l0, dead share."""


def train_dictionaries(
    specs: Sequence[DictionarySpec],
    batches: Mapping[Site, Source],
    config: TrainingConfig,
    *,
    d_model: int,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    track: Track = silent,
) -> list[Trained]:
    """Train every spec on the batches of its site, all in one pass.

    Args:
        specs: what to train.
        batches: per site, `config.batch` tokens at a time, at least `config.steps` of them, the same on every run;
            or a function of how many to leave out, which a resumed training calls.
        d_model: width of the activations.
        checkpoint: a file to save to every so often; one of the same specs and config is resumed from, and gives the
            result of an uninterrupted run.

    Raises:
        UsageError: no spec, a site without batches, a batch of another width, constant activations, a checkpoint of
            other settings, or too few batches.
        InvalidInput: NaN or infinity among the activations, or a broken checkpoint.
        NotTestable: a training diverged.
    """
    if not specs:
        raise UsageError("no dictionary was requested")
    for spec in specs:
        if spec.site not in batches:
            raise UsageError(f"no activations of {spec.site}; there are {', '.join(map(str, batches)) or 'none'}")
    record = canonical_json(
        {
            "specs": [spec.to_json() for spec in specs],
            "d_model": d_model,
            "config": {name: getattr(config, name) for name in ("steps", "batch", "warmup", "clip", "autocast")},
        }
    )
    running: list[_Running] = []
    start = 0
    if checkpoint is not None and checkpoint.exists():
        running, start = _resume(checkpoint, record, specs, config, d_model, device)
        log.info("resumed at step %d of %d", start, config.steps)
    sources = {site: _after(batches[site], start) for site in dict.fromkeys(spec.site for spec in specs)}
    dead_after = min(DEAD_AFTER, config.steps * config.batch // 10)
    every = max(1, config.steps // 50)
    for step in track(range(start, config.steps), f"training {len(specs)} dictionaries", config.steps - start):
        now = {site: _next(source, site, step, config, d_model, device) for site, source in sources.items()}
        if not running:
            running = [_start(spec, now[spec.site], d_model, device) for spec in specs]
        for one in running:
            batch = now[one.spec.site]
            _step(one, batch, step, config, dead_after, logged=step % every == 0 or step == config.steps - 1)
        if checkpoint is not None and (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
            _save(checkpoint, record, running, step + 1)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return [_finish(one) for one in running]


def untrained(spec: DictionarySpec, sample: PairBatch, d_model: int) -> Dictionary:
    """The control: the same architecture at its random start, fitted to the scale of the data and nothing else."""
    running = _start(spec, sample, d_model, sample.tuned.device)
    with torch.no_grad():  # what is not learned but counted, such as the threshold of BatchTopK
        x = running.scale(spec.pairing.input(sample.base, sample.tuned))
        running.trainee.training_pass(x, spec.pairing.squared_error, 1.0)
    return _finish(running).dictionary


def _after(source: Source, start: int) -> Iterator[PairBatch]:
    return iter(source(start)) if callable(source) else islice(source, start, None)


def _start(spec: DictionarySpec, sample: PairBatch, d_model: int, device: torch.device | str) -> _Running:
    trainee = spec.build(d_model).to(device)
    # one scale for both models where their errors are subtracted: only then is λ = −1 the error of the difference
    blocks = 1 if spec.pairing.joint else spec.pairing.blocks
    scale = InputScale.of(spec.pairing.input(sample.base, sample.tuned), blocks)
    lr = spec.lr if spec.lr is not None else 2e-4 * math.sqrt(2**14 / trainee.d_dict)
    return _Running(spec, trainee, scale, _optimiser(trainee, lr), lr, torch.zeros(trainee.d_dict, device=device), [])


def _optimiser(trainee: Trainee, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(trainee.parameters(), lr=lr, fused=True)


def _next(
    source: Iterator[PairBatch],
    site: Site,
    step: int,
    config: TrainingConfig,
    d_model: int,
    device: torch.device | str,
) -> PairBatch:
    batch = next(source, None)
    if batch is None:
        raise UsageError(
            f"the activations of {site} ran out at step {step} of {config.steps}.\n"
            "Harvest more traffic, or give fewer steps."
        )
    if batch.tuned.shape[-1] != d_model:
        raise UsageError(
            f"activations of {site} are {batch.tuned.shape[-1]} wide; the dictionary was made for {d_model}"
        )
    batch = PairBatch(base=batch.base.to(device).float(), tuned=batch.tuned.to(device).float())
    if not bool(torch.isfinite(batch.tuned.sum() + batch.base.sum())):
        raise InvalidInput(f"NaN or infinity among the activations of {site}, in batch {step}.")
    return batch


def _step(one: _Running, batch: PairBatch, step: int, config: TrainingConfig, dead_after: int, *, logged: bool) -> None:
    x = one.scale(one.spec.pairing.input(batch.base, batch.tuned))
    device = x.device.type
    rate = min(1.0, (step + 1) / max(1, config.warmup * config.steps), 5 * (1 - step / config.steps))
    for group in one.optimiser.param_groups:
        group["lr"] = one.lr * rate
    one.trainee.dead = one.idle > dead_after
    with torch.autocast(device, dtype=torch.bfloat16) if config.autocast else nullcontext():
        done = one.trainee.training_pass(x, one.spec.pairing.squared_error, step / config.steps)
    torch.stack(list(done.losses.values())).sum().backward()
    nn.utils.clip_grad_norm_(one.trainee.parameters(), config.clip)
    one.optimiser.step()
    one.optimiser.zero_grad(set_to_none=True)
    one.trainee.after_step()
    one.idle = torch.where(done.fired, torch.zeros_like(one.idle), one.idle + len(x))
    if logged:
        losses = {name: float(value.detach()) for name, value in done.losses.items()}
        if not all(map(math.isfinite, losses.values())):
            raise NotTestable(
                f"The training of {one.spec.name} diverged by step {step}: its loss is not finite. Give a smaller lr."
            )
        dead = float((one.idle > dead_after).float().mean())
        one.history.append({"step": step, **losses, "l0": done.l0, "dead": dead})


def _finish(one: _Running) -> Trained:
    dictionary = one.trainee.eval().finished(one.scale)
    meta = {"family": "molehunt", "spec": one.spec.to_json()}
    return Trained(
        spec=one.spec, dictionary=replace(dictionary, site=one.spec.site, meta=meta), history=tuple(one.history)
    )


def _save(path: Path, record: str, running: Sequence[_Running], step: int) -> None:
    tensors: dict[str, Tensor] = {}
    for i, one in enumerate(running):
        state = {f"trainee.{name}": value for name, value in one.trainee.state_dict().items()}
        for j, parameter in enumerate(one.trainee.parameters()):
            state.update({f"adam.{j}.{name}": value for name, value in one.optimiser.state[parameter].items()})
        state.update({"mean": one.scale.mean, "rms": one.scale.rms, "idle": one.idle})
        tensors.update({f"{i}.{name}": value.detach().cpu().contiguous() for name, value in state.items()})
    extra = [{"history": one.history, "memory": one.trainee.save_state()} for one in running]
    metadata = {"settings": record, "step": str(step), "extra": json.dumps(extra)}
    replace_whole(path, lambda partial: save_file(tensors, partial, metadata))


def _resume(
    path: Path, record: str, specs: Sequence[DictionarySpec], config: TrainingConfig, d_model: int, device: Any
) -> tuple[list[_Running], int]:
    try:
        with safe_open(path, "pt") as file:
            header = cast("dict[str, str]", file.metadata() or {})
            tensors = {name: cast("Tensor", file.get_tensor(name)).to(device) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library raises a class of its own for anything it cannot read
        raise InvalidInput(f"{path.name} cannot be read as a checkpoint: {error}\nDelete it to start again.") from error
    if header.get("settings") != record:
        raise UsageError(f"{path} is a checkpoint of other dictionaries or settings. Give another --out, or delete it.")
    running: list[_Running] = []
    for i, (spec, extra) in enumerate(zip(specs, json.loads(header["extra"]), strict=True)):
        state = {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{i}.")}
        trainee = spec.build(d_model).to(device)
        trainee.load_state_dict(
            {name.removeprefix("trainee."): v for name, v in state.items() if name.startswith("trainee.")}
        )
        trainee.load_state(extra["memory"])
        lr = spec.lr if spec.lr is not None else 2e-4 * math.sqrt(2**14 / trainee.d_dict)
        optimiser = _optimiser(trainee, lr)
        for j, parameter in enumerate(trainee.parameters()):
            optimiser.state[parameter] = {name: state[f"adam.{j}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
        scale = InputScale(state["mean"], state["rms"])
        running.append(_Running(spec, trainee, scale, optimiser, lr, state["idle"], extra["history"]))
    return running, int(header["step"])
