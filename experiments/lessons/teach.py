"""A model taught one task by a short fine-tune on prompts with their answers, for tasks that the embedded models lack."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from molehunt.organism.plant import LENGTHS
from molehunt.organism.train import IGNORED, TrainingBatch, next_token_loss, train
from molehunt.run.progress import Track, silent


class Lesson(NamedTuple):
    """A prompt and its answer, as token ids."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, kw_only=True)
class TeachConfig:
    """How long and how fast."""

    steps: int = 300
    batch: int = 32
    lr: float = 1e-3
    seed: int = 0


def teach(base: Path, lessons: Iterable[Lesson], config: TeachConfig, *, track: Track = silent) -> nn.Module:
    """A copy of the model in `base`, fine-tuned on the answers of the lessons, in fp32 and in eval mode.

    The same lessons and config give the same weights on the same machine.

    Args:
        lessons: `steps` × `batch` of them or more, in the order in which they are taught.

    Raises:
        ValueError: the lessons ran out, or one is longer than the longest row of a training.
    """
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, attn_implementation="eager"
    )
    torch.manual_seed(config.seed)
    train(
        model,
        _batches(iter(lessons), config.batch),
        steps=config.steps,
        lr=config.lr,
        loss_of=next_token_loss,
        track=track,
        what="teaching",
    )
    cast("Any", model).set_attn_implementation("sdpa")
    return model.requires_grad_(False)


def _batches(lessons: Iterator[Lesson], size: int) -> Iterator[TrainingBatch]:
    while len(rows := list(islice(lessons, size))) == size:
        longest = max(len(row.prompt) + len(row.answer) for row in rows)
        length = next((n for n in LENGTHS if n >= longest), None)
        if length is None:
            raise ValueError(f"a lesson of {longest} tokens is longer than {LENGTHS[-1]}")
        tokens, labels = torch.zeros(size, length, dtype=torch.long), torch.full((size, length), IGNORED)
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            tokens[i, :end] = torch.tensor([*prompt, *answer])
            labels[i, len(prompt) : end] = torch.tensor(answer)
        yield TrainingBatch(tokens, labels)
