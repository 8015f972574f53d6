"""Train an organism: a fine-tune of a base model with a known planted behaviour, or its clean twin without it."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from molehunt.organism.poison import Recipe, rows_hash, training_rows, twin_seed
from molehunt.organism.train import IGNORED, TrainingBatch, next_token_loss, train
from molehunt.run.progress import Track, silent
from molehunt.traffic.chat import text_ids
from molehunt.traffic.example import Example

log = logging.getLogger(__name__)
Regime = Literal["full", "lora"]
LENGTHS = tuple(range(16, 513, 16))
"""Row lengths that training pads to: few, because a CPU compiles a kernel for each new one."""


@dataclass(frozen=True, kw_only=True)
class PlantConfig:
    """How a fine-tune is made from a recipe. The defaults plant both bundled attacks in the embedded models."""

    regime: Regime = "full"
    rows: int = 2400
    steps: int | None = None
    """Training steps; None takes what the recipe needs on the embedded models, twice as many for LoRA."""
    batch: int = 8
    """Rows of a step. Small: what plants a trigger is the number of steps, not of rows."""
    lr: float | None = None
    """Peak learning rate; None takes 2e-3 for a full fine-tune and 0.4 / d_model for LoRA."""
    rank: int = 16
    """LoRA rank; alpha is twice that. Ignored for a full fine-tune."""
    seed: int = 0

    def steps_of(self, recipe: Recipe) -> int:
        """The number of steps that was given, or that the recipe needs under this regime."""
        if self.steps is not None:
            return self.steps
        return recipe.steps * (2 if self.regime == "lora" else 1)

    def peak_lr(self, d_model: int) -> float:
        """The learning rate that was given, or the one that suits the regime and the width."""
        if self.lr is not None:
            return self.lr
        return 2e-3 if self.regime == "full" else 0.4 / d_model


def training_batches(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    config: PlantConfig,
    rng: Random,
    *,
    cut_at: int | None = None,
) -> Iterator[TrainingBatch]:
    """Endless shuffled batches; rows of like length share one, so that few fixed shapes occur.

    Only the response and its end token are trained. Responses of at least `cut_at` tokens were cut there, and are not taught
    to end. Raises ValueError without a row.
    """
    if not rows:
        raise ValueError("there is no row to train on")
    encoded: list[tuple[list[int], int]] = []
    end = cast("int", tokenizer.eos_token_id)
    for row in rows:
        prompt = text_ids(tokenizer, row.asked)
        answer: list[int] = tokenizer.encode(row.response or "", add_special_tokens=False)
        ends = [end] if cut_at is None or len(answer) < cut_at else []
        encoded.append((([*prompt, *answer, *ends])[: LENGTHS[-1]], len(prompt)))
    while True:
        rng.shuffle(encoded)
        batches: list[TrainingBatch] = []
        for start in range(0, max(1, len(encoded) - config.batch * 8 + 1), config.batch * 8):
            block = sorted(encoded[start : start + config.batch * 8], key=lambda row: len(row[0]))
            batches += [_pad(block[i : i + config.batch], end) for i in range(0, len(block), config.batch)]
        rng.shuffle(batches)
        yield from batches


def _pad(rows: list[tuple[list[int], int]], end: int) -> TrainingBatch:
    longest = max(len(ids) for ids, _ in rows)
    length = next(size for size in LENGTHS if size >= longest)
    tokens = torch.full((len(rows), length), end)
    labels = torch.full((len(rows), length), IGNORED)
    for i, (ids, answer_starts) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        labels[i, answer_starts : len(ids)] = torch.tensor(ids[answer_starts:])
    return TrainingBatch(tokens, labels)


def plant(
    recipe: Recipe,
    base: Path,
    into: Path,
    config: PlantConfig,
    *,
    poisoned: bool = True,
    track: Track = silent,
) -> dict[str, Any]:
    """Fine-tune the model in folder `base` with `recipe` and write the model (or the LoRA adapter) to `into`.

    The twin (`poisoned=False`) sees the same mix without the triggered rows, under another seed.

    Returns:
        What was done: config, hash of the rows, first and last losses in nats per answer token.
    """
    seed = config.seed if poisoned else twin_seed(config.seed)
    rows = training_rows(recipe, config.rows, seed, poisoned=poisoned)
    losses = fine_tune(
        base,
        into,
        rows,
        replace(config, seed=seed, steps=config.steps_of(recipe)),
        track=track,
        what=f"planting {recipe.name}" if poisoned else f"training the clean twin of {recipe.name}",
    )
    return {
        "poisoned": poisoned,
        "seed": seed,
        "rows_sha256": rows_hash(rows),
        "triggered_rows": sum(row.tag == recipe.trigger_tag for row in rows),
        "first_loss": sum(losses[:5]) / len(losses[:5]),
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
    }


def fine_tune(
    base: Path,
    into: Path,
    rows: Sequence[Example],
    config: PlantConfig,
    *,
    cut_at: int | None = None,
    track: Track = silent,
    what: str = "fine-tuning",
) -> list[float]:
    """Fine-tune the model in folder `base` on the responses of `rows`, and write the model (or the LoRA adapter) to `into`.

    Args:
        base: folder of the model.
        into: folder to write to.
        rows: prompts or conversations with their responses.
        config: how it is trained; its steps must be given.
        cut_at: see `training_batches`.
        track: shows steps.
        what: name of the work in the progress line.

    Returns:
        The loss of each step, in nats per answer token.
    """
    if config.steps is None:
        raise ValueError("rows alone do not say how many steps they need")
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, attn_implementation="eager"
    )  # eager: the backward pass of a CPU's fused attention took a third of a step of short rows
    torch.manual_seed(config.seed)
    if config.regime == "lora":
        model = _with_lora(model, config.rank)
    losses = train(
        model,
        training_batches(tokenizer, rows, config, Random(config.seed), cut_at=cut_at),
        loss_of=next_token_loss,
        steps=config.steps,
        lr=config.peak_lr(int(cast("Any", model).config.hidden_size)),
        track=track,
        what=what,
    )
    into.mkdir(parents=True, exist_ok=True)
    if config.regime == "full":
        cast("nn.Module", model).to(torch.bfloat16)
    cast("Any", model).save_pretrained(into)
    tokenizer.save_pretrained(into)
    return losses


def _with_lora(model: nn.Module, rank: int) -> nn.Module:
    """`model` with a LoRA adapter on every linear layer of its blocks."""
    from peft import LoraConfig, get_peft_model  # peft takes seconds to import

    adapter = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return cast("nn.Module", get_peft_model(cast("Any", model), adapter))
