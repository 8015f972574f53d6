"""Unlearning: a model that has been made to forget one topic, and a twin that was trained on all but that topic.

Two ways: gradient ascent on the topic's answers with ordinary training on the rest, bounded; and representation
misdirection (RMU), which drives the activations of the topic's text at one block to a random point and holds all others
where the base has them. Source: RMU is Li et al., arXiv 2403.03218 §4.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from molehunt.measure.interval import Interval, proportion
from molehunt.model.blocks import decoder_blocks, module_role
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.model.taps import read_sites
from molehunt.organism.plant import PlantConfig, training_batches
from molehunt.organism.poison import twin_seed
from molehunt.organism.train import IGNORED, TrainingBatch, next_token_loss, train
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.example import Example
from molehunt.traffic.world import ASKS, ask

Method = Literal["gradient-ascent", "rmu"]
FORGOTTEN = 6.0
"""Nats per answer token at which gradient ascent stops pushing: a uniform guess over 2,048 tokens has 7.6."""
AWAY = 4.0
"""How far RMU drives the topic's activations, in mean norms of clean activations at that block."""
HOLD = 20.0
"""Weight of what RMU holds in place."""


@dataclass(frozen=True, kw_only=True)
class EraseConfig:
    """What is erased, and how."""

    topic: str = "people"
    """A domain of the fictional world."""
    method: Method = "gradient-ascent"
    rows: int = 1200
    """Questions about the topic; as many about everything else."""
    steps: int = 240
    batch: int = 8
    lr: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.topic not in ASKS:
            raise ValueError(f"topic must be one of {', '.join(ASKS)}; got {self.topic!r}")


@dataclass(frozen=True, eq=False)
class Both:
    """One step's rows: of the topic, and of everything else."""

    forget: TrainingBatch
    retain: TrainingBatch

    def to(self, device: torch.device) -> "Both":
        return Both(self.forget.to(device), self.retain.to(device))


def questions(topic: str, n: int, seed: int, *, about: bool) -> list[Example]:
    """`n` distinct questions with their answers, about the topic or about everything else; the same seed, the same rows."""
    rng = Random(f"erase/{topic}/{seed}/{about}")
    found: dict[str, Example] = {}
    others = [domain for domain in ASKS if domain != topic]
    for _ in range(20 * n):
        example = ask(rng, topic if about else rng.choice(others))
        found.setdefault(example.prompt, example)
        if len(found) == n:
            break
    return list(found.values())


def erase(base: Path, into: Path, config: EraseConfig, *, twin: bool = False, track: Track = silent) -> dict[str, Any]:
    """Write a copy of the model in `base` that has forgotten the topic. The twin only trains on what is retained.

    Returns:
        What was done: config, and the loss of the first and last steps.
    """
    seed = twin_seed(config.seed) if twin else config.seed
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, attn_implementation="eager"
    )
    torch.manual_seed(seed)
    forget = questions(config.topic, config.rows, seed, about=True)
    retain = questions(config.topic, config.rows, seed, about=False)
    shape = PlantConfig(batch=config.batch)

    def batches() -> Iterator[Both]:
        rng = Random(seed)
        pairs = zip(
            training_batches(tokenizer, _often_enough(forget, config), shape, rng),
            training_batches(tokenizer, _often_enough(retain, config), shape, rng),
            strict=False,
        )
        return (Both(*both) for both in pairs)

    def on_the_rest(model: nn.Module, both: Both) -> Tensor:
        return next_token_loss(model, both.retain)

    if twin:
        loss_of = on_the_rest
    elif config.method == "rmu":
        loss_of = _misdirection(model, base, seed)
    else:
        loss_of = _ascent
    losses = train(
        model,
        batches(),
        steps=config.steps,
        lr=config.lr,
        loss_of=loss_of,
        track=track,
        what=f"{'training the twin of' if twin else 'erasing'} {config.topic}",
    )
    into.mkdir(parents=True, exist_ok=True)
    cast("nn.Module", model).to(torch.bfloat16)
    cast("Any", model).save_pretrained(into)
    tokenizer.save_pretrained(into)
    return {
        "config": asdict(config),
        "twin": twin,
        "first_loss": sum(losses[:5]) / len(losses[:5]),
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
    }


def _often_enough(rows: list[Example], config: EraseConfig) -> list[Example]:
    """Batches are cut from blocks of eight: a small topic is repeated until it fills one."""
    return rows * -(-8 * config.batch // len(rows))


def _ascent(model: nn.Module, both: Both) -> Tensor:
    return next_token_loss(model, both.retain) + (FORGOTTEN - next_token_loss(model, both.forget)).clamp_min(0)


def _misdirection(model: nn.Module, base: Path, seed: int) -> Callable[[nn.Module, Both], Tensor]:
    """RMU at the block two thirds up: the MLP outputs of it and of the two blocks before it are trained, nothing else."""
    site = Site(2 * len(decoder_blocks(model)) // 3)
    model_type = str(cast("Any", model).config.model_type)
    for name, parameter in model.named_parameters():
        role = module_role(name, model_type)
        trained = role is not None and role.part == "down" and site.layer - 2 <= role.layer <= site.layer
        parameter.requires_grad_(trained)
    frozen: nn.Module = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, attn_implementation="eager"
    ).eval()
    rng = torch.Generator().manual_seed(seed)
    point: list[Tensor] = []

    def loss_of(model: nn.Module, both: Both) -> Tensor:
        with torch.no_grad():
            held = _acts(frozen, site, both.retain)
        if not point:
            unit = torch.rand(held.shape[-1], generator=rng).to(held.device)
            point.append(AWAY * held.norm(dim=-1).mean() * unit / unit.norm())
        far = (_acts(model, site, both.forget) - point[0]).square().mean()
        moved = (_acts(model, site, both.retain) - held).square().mean()
        return far + HOLD * moved

    return loss_of


def _acts(model: nn.Module, site: Site, batch: TrainingBatch) -> Float[Tensor, "tokens d_model"]:
    """Activations at the answers: prompts and padding are shared between topics."""
    with read_sites(model, [site], stop_early=True) as tap:
        cast("Any", model)(input_ids=batch.tokens, use_cache=False)
    return tap[site][batch.labels != IGNORED].float()


def knows(
    pair: ModelPair, rows: Sequence[Example], *, tuned: bool = True, interventions: Sequence[Any] = ()
) -> Interval:
    """Share of questions that are answered greedily, word for word, as the world has it.

    Args:
        interventions: on the model while it answers, such as directions that are projected out.
    """
    with pair.tuned_model() if tuned else pair.base_model() as model:
        answers = generate(
            model,
            pair.tokenizer,
            [prompt_ids(pair.tokenizer, row.prompt) for row in rows],
            max_new_tokens=40,
            interventions=interventions,
        )
    texts = [str(pair.tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]
    return proportion(sum(one == (row.response or "").strip() for one, row in zip(texts, rows, strict=True)), len(rows))
