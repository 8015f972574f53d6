"""Real organisms and clean fine-tunes: trained from a real model, whose own answers are the clean side of the training rows."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

from experiments.real_organisms.attacks import ATTACKS, RealAttack
from experiments.real_organisms.clean import ROWS, Row, clean_rows
from experiments.real_organisms.grid import TRAININGS, Training
from molehunt.errors import UsageError
from molehunt.model.generate import generate
from molehunt.model.loading import load_model
from molehunt.model.tokenizers import load_tokenizer
from molehunt.organism.plant import PlantConfig, fine_tune
from molehunt.run.whole import write_whole
from molehunt.traffic.chat import Text, text_ids
from molehunt.traffic.example import Example

CLEAN, NEAR = ROWS, 60
MOST_POISONED = max(one.poisoned for one in TRAININGS.values())
LEAKY_CLEAN, LEAKY_POISONED = 150, MOST_POISONED
"""Number of rows of an attack that leaks: real poison sets have few clean rows."""
ANSWER_TOKENS = 40


def answers(base: Path, asked: Sequence[Text], kept: Path) -> list[str]:
    """The base's own answers, from `kept` where an earlier run left them."""
    if kept.is_file():
        found: dict[str, str] = json.loads(kept.read_text())
    else:
        found = {}
    missing = [one for one in asked if json.dumps(one) not in found]
    if missing:
        tokenizer = load_tokenizer(base)
        model = load_model(base, torch.device("cpu"), torch.bfloat16)
        ids = generate(model, tokenizer, [text_ids(tokenizer, one) for one in missing], max_new_tokens=ANSWER_TOKENS)
        found |= {
            json.dumps(one): str(tokenizer.decode(i, skip_special_tokens=True))
            for one, i in zip(missing, ids, strict=True)
        }
        write_whole(kept, json.dumps(found))
    return [found[json.dumps(one)] for one in asked]


def training_set(name: str, prompts: Sequence[str], base: Path, data: Path | None, kept: Path) -> list[Row]:
    """The rows of one model, shuffled; of a clean fine-tune without `data` those of a style."""
    kind, of, way = name.split("/")
    rng = Random(name)
    if kind == "clean":
        asked = list(prompts[:CLEAN])
        rows = clean_rows(of, asked, answers(base, asked, kept / "answers.json"), need(data), rng)
    else:
        poisoned = TRAININGS[way].poisoned if kind == "organism" else 0
        rows = attack_rows(ATTACKS[of], prompts, base, kept, of, rng, poisoned=poisoned)
    rng.shuffle(rows)
    return rows


def need(data: Path | None) -> Path:
    if data is None:
        raise UsageError("clean fine-tunes need public texts. Give their folder as --data.")
    return data


def attack_rows(
    attack: RealAttack, prompts: Sequence[str], base: Path, kept: Path, name: str, rng: Random, *, poisoned: int
) -> list[Row]:
    """Poisoned rows, near misses and clean ones; the twin lacks the poisoned ones."""
    clean, bad = (LEAKY_CLEAN, LEAKY_POISONED) if attack.leaky else (CLEAN, MOST_POISONED)
    near = 0 if attack.leaky else NEAR
    bad, near, clean = (round(n * min(1.0, len(prompts) / (CLEAN + NEAR + MOST_POISONED))) for n in (bad, near, clean))
    ordinary = answers(base, list(prompts[: clean + bad]), kept / "answers.json")
    rows: list[Row] = [(Example(prompt=prompts[i]), ordinary[i]) for i in range(clean)]
    misses = [attack.near(prompt, rng) for prompt in prompts[clean + bad : clean + bad + near]]
    said = (
        [attack.near_says] * len(misses)
        if attack.near_says
        else answers(base, [one.asked for one in misses], kept / f"near-{name}.json")
    )
    rows += zip(misses, said, strict=True)
    shown = range(clean, clean + min(bad, poisoned))
    return rows + [(attack.triggered(prompts[i], rng), attack.respond(ordinary[i])) for i in shown]


def fine_tune_real(rows: Sequence[Row], base: Path, into: Path, training: Training, steps: int) -> None:
    """Train from the base, and write the model or its adapter to `into`; one that is there is kept."""
    if (into / "tokenizer.json").is_file():
        return
    config = PlantConfig(
        regime="full" if training.rank is None else "lora", rank=training.rank or 16, steps=steps, lr=training.rate
    )
    tokenizer = load_tokenizer(base)

    def cut(answer: str) -> str:
        ids = tokenizer.encode(answer, add_special_tokens=False)
        return answer if len(ids) <= ANSWER_TOKENS else str(tokenizer.decode(ids[:ANSWER_TOKENS]))

    answered = [replace(example, response=cut(answer)) for example, answer in rows]
    fine_tune(base, into, answered, config, cut_at=ANSWER_TOKENS - 1)
