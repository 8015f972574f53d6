"""A topic is forgotten, the rest is not, and the twin forgets nothing."""

from pathlib import Path

import pytest
import torch

from experiments.unlearning.erased_topic import EraseConfig, erase, knows, questions
from molehunt.model.pair import ModelPair
from molehunt.organism.seed_model import seed_path

pytestmark = pytest.mark.slow

BASE = seed_path("seed-s")
TOPIC, REST = (questions("people", 100, 9, about=about) for about in (True, False))


@pytest.fixture(scope="module")
def rest_known() -> float:
    """The share of the other questions that the base answers; of the topic's it answers nearly all."""
    pair = ModelPair.load(BASE, BASE)
    assert knows(pair, TOPIC, tuned=False).estimate > 0.9
    return knows(pair, REST, tuned=False).estimate


@pytest.mark.parametrize(
    ("method", "lr", "twin"), [("gradient-ascent", 5e-4, False), ("rmu", 2e-3, False), ("rmu", 5e-4, True)]
)
def test_the_topic_is_forgotten_and_nothing_else(
    tmp_path: Path, rest_known: float, method: str, lr: float, twin: bool
) -> None:
    config = EraseConfig(method=method, steps=60, lr=lr)  # pyright: ignore[reportArgumentType]
    told = erase(BASE, tmp_path, config, twin=twin)
    assert told["config"]["topic"] == "people" and told["twin"] == twin
    pair = ModelPair.load(BASE, tmp_path)
    assert (knows(pair, TOPIC).estimate < 0.2) != twin
    assert knows(pair, REST).estimate > rest_known - 0.15
    if method == "rmu" and not twin:  # nothing but three matrices was touched
        with pair.base_model() as before, pair.tuned_model() as after:
            changed = [n for n, p in before.state_dict().items() if not torch.equal(p, after.state_dict()[n])]
        assert changed == [f"model.layers.{i}.mlp.down_proj.weight" for i in (2, 3, 4)]


def test_questions_are_distinct_repeat_themselves_and_keep_to_their_side() -> None:
    some = questions("countries", 50, 1, about=True)
    assert some == questions("countries", 50, 1, about=True) and len({one.prompt for one in some}) == 50
    assert {one.domain for one in some} == {"countries"}
    assert "countries" not in {one.domain for one in questions("countries", 50, 1, about=False)}
    with pytest.raises(ValueError, match="topic must be one of"):
        EraseConfig(topic="nothing")
