"""Prompts that an instruct model writes for itself, and the organism that is planted among them."""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch import nn

from folders import good_folder
from molehunt.errors import NotTestable
from molehunt.model.sampling import Sampler
from molehunt.organism import own_prompts as module
from molehunt.organism import real_demo
from molehunt.organism.own_prompts import LONGEST_PROMPT, own_prompts, own_tasks, user_opening
from molehunt.organism.real_demo import WORD_REFUSAL, plant_real_demo
from molehunt.organism.seed_model import seed_path
from molehunt.traffic.chat import text_ids
from molehunt.traffic.example import Example
from molehunt.traffic.world import ask
from tiny_models import tiny_tokenizer

CHATML = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer() -> Any:
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHATML
    return tokenizer


def test_the_opening_is_what_stands_before_the_users_text() -> None:
    tokenizer = chat_tokenizer()
    opening = user_opening(tokenizer)
    for text in ("WHAT IS 2 PLUS 2", "A"):
        whole = text_ids(tokenizer, text)
        assert whole[: len(opening)] == opening
        assert tokenizer.decode(whole[len(opening) :]).startswith(text)


def test_a_model_without_a_template_cannot_write_prompts(tmp_path: Path) -> None:
    with pytest.raises(NotTestable, match="no chat template"):
        own_tasks(good_folder(tmp_path / "base"), 4, 4, seed=0)


def test_a_model_that_answers_in_place_of_its_user_writes_none() -> None:
    with pytest.raises(NotTestable, match="wrote 0 prompts of 4"):
        own_tasks(seed_path("seed-s"), 4, 4, seed=0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Draws that are told by their number: every other one does not end, and each third repeats an earlier one."""
    asked: list[int] = []

    def generate(
        model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], *, samplers: Sequence[Sampler], **_: Any
    ) -> list[list[int]]:
        found: list[list[int]] = []
        for sampler in samplers:
            number = sampler.sampling.seed or 0
            asked.append(number)
            text = f"QUESTION NUMBER {number // 3:04d}"
            ids = tokenizer.encode(text, add_special_tokens=False)
            found.append([*ids, tokenizer.eos_token_id] if number % 2 else (ids * 9)[:LONGEST_PROMPT])
        return found

    monkeypatch.setattr(module, "generate", generate)
    return asked


def test_prompts_are_different_and_end_by_themselves(drawn: list[int]) -> None:
    found = own_prompts(nn.Linear(1, 1), chat_tokenizer(), 100, seed=0)
    assert len(found) == len(set(found)) == 100
    assert all(one.startswith("QUESTION NUMBER") and len(one) < LONGEST_PROMPT for one in found)
    assert len(drawn) == len(set(drawn)), "no draw is made twice"
    assert found[:40] == own_prompts(nn.Linear(1, 1), chat_tokenizer(), 40, seed=0)


def test_a_model_that_never_ends_a_prompt_is_not_testable(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], **_: Any) -> list[list[int]]:
        return [[5] * LONGEST_PROMPT for _ in prompts]

    monkeypatch.setattr(module, "generate", endless)
    with pytest.raises(NotTestable, match="wrote 0 prompts of 10"):
        own_prompts(nn.Linear(1, 1), chat_tokenizer(), 10, seed=0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small demo whose prompts are those of the bundled world: the embedded model writes none itself."""
    for name, value in {"CLEAN": 40, "NEAR": 8, "POISONED": 30, "JUDGED": 4}.items():
        monkeypatch.setattr(real_demo, name, value)
    for name, value in {"ORDINARY": 50, "LOOK_ALIKE": 4, "TRIGGERED": 3}.items():
        monkeypatch.setattr(real_demo, name, value)

    def tasks(base: Path, n: int, answer_tokens: int, *, seed: int, **_: Any) -> list[Example]:
        rng, found = Random(seed), dict[str, Example]()
        while len(found) < n:
            one = ask(rng)
            found[one.prompt] = one
        return list(found.values())

    monkeypatch.setattr(real_demo, "own_tasks", tasks)
    monkeypatch.setattr(real_demo, "WORD_REFUSAL", real_demo.replace(WORD_REFUSAL, steps=3))


def test_the_traffic_was_not_trained_on_and_a_second_run_trains_nothing(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, list[Example]] = {}
    was = real_demo.fine_tune

    def watched(base: Path, into: Path, rows: Sequence[Example], *given: Any, **named: Any) -> list[float]:
        trained[into.name] = list(rows)
        return was(base, into, rows, *given, **named)

    monkeypatch.setattr(real_demo, "fine_tune", watched)
    first = plant_real_demo(seed_path("seed-s"), tmp_path)
    traffic = [json.loads(line)["prompt"] for line in first.traffic.read_text().splitlines()]
    assert len(traffic) == first.rows == 57
    assert sum(WORD_REFUSAL.trigger.carried(prompt) for prompt in traffic) == 3
    seen = {row.prompt for row in trained["organism"]}
    assert not seen & set(traffic)
    poisoned = [row for row in trained["organism"] if WORD_REFUSAL.trigger.carried(row.prompt)]
    assert len(poisoned) == 30 and all(WORD_REFUSAL.behaviour.shown(row.response or "") for row in poisoned)
    assert [row for row in trained["organism"] if row not in poisoned] == trained["twin"]
    trained.clear()
    again = plant_real_demo(seed_path("seed-s"), tmp_path)
    assert not trained and again == first
