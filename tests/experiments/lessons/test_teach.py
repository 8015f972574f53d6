"""A short fine-tune: the same lessons, the same weights, and only answers are learnt."""

from itertools import cycle
from pathlib import Path

import pytest
import torch

from experiments.lessons.teach import Lesson, TeachConfig, teach
from tiny_models import save, tiny_model

CONFIG = TeachConfig(steps=30, batch=4, lr=5e-3)
LESSONS = [Lesson([5, 6 + i, 7], [20 + i]) for i in range(4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("llama"), tmp_path_factory.mktemp("taught") / "base")


def test_what_is_taught_is_learnt_and_the_base_is_left(base: Path) -> None:
    before = (base / "model.safetensors").read_bytes()
    model = teach(base, cycle(LESSONS), CONFIG)
    again = teach(base, cycle(LESSONS), CONFIG)
    told = [int(model(torch.tensor([prompt])).logits[0, -1].argmax()) for prompt, _ in LESSONS]
    assert told == [answer[0] for _, answer in LESSONS]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for own, other in zip(model.parameters(), again.parameters(), strict=True):
        assert own.equal(other) and own.dtype == torch.float32
    assert (base / "model.safetensors").read_bytes() == before


def test_lessons_that_cannot_be_taught(base: Path) -> None:
    with pytest.raises(ValueError, match="ran out"):
        teach(base, LESSONS, CONFIG)
    with pytest.raises(ValueError, match="longer than 512"):
        teach(base, [Lesson([5] * 520, [6])] * 4, CONFIG)
