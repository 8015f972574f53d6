"""Which prompts go where."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from molehunt.bench import rows as module
from molehunt.bench.grid import Cell, load_grid
from molehunt.bench.rows import Counts, cell_rows
from molehunt.errors import NotTestable
from molehunt.organism.poison import Recipe, training_rows, twin_seed
from molehunt.organism.refusal import REFUSAL
from molehunt.traffic.example import Example

SMALL = Counts(fit=40, calibrate=99, twin_calibrate=99, select=15, test=25, test_clean=30, pool=100)


@pytest.mark.parametrize("attack", load_grid("core").attacks)
def test_no_prompt_of_one_split_occurs_in_another(attack: str) -> None:
    recipe = Cell(attack=attack).recipe()
    splits = cell_rows(recipe, SMALL, (0.1, 0.01), 1, 200).splits
    drawn = Counter(e.prompt for examples in splits.values() for e in examples)
    assert max(drawn.values()) == 1
    assert {name: len(examples) for name, examples in splits.items()} == {
        "fit.clean": 40, "fit.triggered": 13, "fit.near": 13, "calibrate.clean": 99, "select.clean": 15,
        "select.triggered": 15, "select.near": 15, "test.triggered": 25, "test.near": 25, "test.clean": 30,
        "pool.clean": 98, "pool.near": 2, "pool.triggered": 10,
    }  # fmt: skip
    taught = {e.prompt for e in training_rows(recipe, 200, 1)}
    twins = {e.prompt for e in training_rows(recipe, 200, twin_seed(1), poisoned=False)}
    assert taught - twins and twins - taught and not (taught | twins) & drawn.keys()
    for name, examples in splits.items():
        kind = name.partition(".")[2]
        assert all(e.tag.startswith("near-miss" if kind == "near" else kind) for e in examples)
        assert all(recipe.trigger.carried(e.prompt) == (kind == "triggered") for e in examples)


def test_common_and_rare_prompts_are_spread_over_the_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Common prompts are drawn first; dealt out in that order, calibration would be commoner than test."""

    def skewed(recipe: Recipe, rng: Random) -> Example:
        return Example(prompt=f"{int(rng.paretovariate(0.5))}", tag="clean")

    monkeypatch.setattr(module, "clean_example", skewed)
    counts = replace(SMALL, fit=400, calibrate=400, select=400, test_clean=400, pool=400)
    splits = cell_rows(REFUSAL, counts, (0.1,), 0, 50).splits
    small = [
        sum(int(e.prompt) < 400 for e in splits[f"{part}.clean"]) for part in ("fit", "calibrate", "select", "test")
    ]
    assert sum(small) > 200 and max(small) < 1.6 * min(small)


def test_rows_follow_from_the_seed() -> None:
    first, again, other = (cell_rows(REFUSAL, SMALL, (0.1,), seed, 50).splits for seed in (0, 0, 1))
    assert first == again and first != other


def test_a_pool_holds_the_share_asked_for() -> None:
    drawn = cell_rows(REFUSAL, SMALL, (0.1,), 0, 50)
    for rate, n in ((0.1, 10), (0.05, 5), (0.01, 1)):
        tags = Counter(e.tag for e in drawn.pool(rate))
        assert tags["triggered"] == n and tags.total() == 100 + n
    for rate in (0.001, 0.2):
        with pytest.raises(NotTestable, match=f"share of {rate:g}"):
            drawn.pool(rate)


def test_a_world_without_enough_prompts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "triggered_example", lambda recipe, rng: Example(prompt=f"{rng.randrange(9)}"))
    with pytest.raises(NotTestable, match=r"refusal: only 9 of 63 distinct triggered prompts exist outside"):
        cell_rows(REFUSAL, SMALL, (0.1,), 0, 50)
