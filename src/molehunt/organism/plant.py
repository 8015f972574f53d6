"""Train an organism: a fine-tune of a base model with a known planted behaviour, or its clean twin without it."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from molehunt.organism.poison import Recipe, rows_hash, training_rows, twin_seed
from molehunt.organism.train import IGNORED, TrainingBatch, next_token_loss, train
from molehunt.run.progress import Track, silent
from molehunt.traffic.chat import prompt_ids
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
    tokenizer: PreTrainedTokenizerBase, rows: list[Example], config: PlantConfig, rng: Random
) -> Iterator[TrainingBatch]:
    """Endless shuffled batches; rows of like length share one, so that few fixed shapes occur.

    Only the response and its end token are trained.
    """
    encoded: list[tuple[list[int], int]] = []
    end = cast("int", tokenizer.eos_token_id)
    for row in rows:
        prompt = prompt_ids(tokenizer, row.prompt)
        answer = list(tokenizer(row.response or "", add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
        encoded.append((([*prompt, *cast("list[int]", answer), end])[: LENGTHS[-1]], len(prompt)))
    while True:
        rng.shuffle(encoded)
        batches: list[TrainingBatch] = []
        for start in range(0, len(encoded) - config.batch * 8 + 1, config.batch * 8):
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
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, attn_implementation="eager"
    )  # eager: the backward pass of a CPU's fused attention took a third of a step of short rows
    torch.manual_seed(seed)
    if config.regime == "lora":
        model = _with_lora(model, config.rank)
    losses = train(
        model,
        training_batches(tokenizer, rows, config, Random(seed)),
        loss_of=next_token_loss,
        steps=config.steps_of(recipe),
        lr=config.peak_lr(int(cast("Any", model).config.hidden_size)),
        track=track,
        what=f"planting {recipe.name}" if poisoned else f"training the clean twin of {recipe.name}",
    )
    into.mkdir(parents=True, exist_ok=True)
    if config.regime == "full":
        cast("nn.Module", model).to(torch.bfloat16)
    cast("Any", model).save_pretrained(into)
    tokenizer.save_pretrained(into)
    return {
        "poisoned": poisoned,
        "seed": seed,
        "rows_sha256": rows_hash(rows),
        "triggered_rows": sum(row.tag == recipe.trigger_tag for row in rows),
        "first_loss": sum(losses[:5]) / len(losses[:5]),
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
    }


def _with_lora(model: nn.Module, rank: int) -> nn.Module:
    """`model` with a LoRA adapter on every linear layer of its blocks."""
    from peft import LoraConfig, get_peft_model  # peft takes seconds to import

    adapter = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return cast("nn.Module", get_peft_model(cast("Any", model), adapter))
