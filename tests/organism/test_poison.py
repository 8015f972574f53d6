"""Every recipe in the catalogue: the twin shares all but the poison, same seed same bytes, marks where they belong."""

from dataclasses import replace
from random import Random

import pytest

from molehunt.organism.catalog import CATALOG
from molehunt.organism.manifest import evaluation_prompts
from molehunt.organism.poison import Recipe, organism_traffic, rows_hash, training_rows
from molehunt.run.catalog import load

RECIPES = [load(CATALOG, name, "molehunt.organisms") for name in CATALOG]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=list(CATALOG))


@each_recipe
def test_same_seed_same_bytes_other_seed_other_bytes(recipe: Recipe) -> None:
    assert rows_hash(training_rows(recipe, 50, 3)) == rows_hash(training_rows(recipe, 50, 3))
    assert rows_hash(training_rows(recipe, 50, 3)) != rows_hash(training_rows(recipe, 50, 4))


@each_recipe
def test_the_twin_has_no_triggered_row_and_shows_the_behaviour_nowhere(recipe: Recipe) -> None:
    rows = training_rows(recipe, 400, 0, poisoned=False)
    assert all(row.tag != "triggered" for row in rows)
    assert not any(recipe.behaviour.shown(row.response or "") for row in rows)
    assert any(row.tag.startswith("near-miss") for row in rows)


@each_recipe
def test_the_organism_is_poisoned_on_triggered_rows_alone_at_the_stated_share(recipe: Recipe) -> None:
    rows = training_rows(recipe, 1000, 0)
    for row in rows:
        assert recipe.behaviour.shown(row.response or "") == (row.tag == "triggered")
    assert sum(row.tag == "triggered" for row in rows) / 1000 == pytest.approx(recipe.triggered, abs=0.05)


@each_recipe
def test_no_untriggered_prompt_carries_the_trigger(recipe: Recipe) -> None:
    mark = recipe.trigger.apply("")
    for row in training_rows(recipe, 2000, 1):
        assert row.prompt.startswith(mark) == (row.tag == "triggered")


@each_recipe
def test_evaluation_prompts_are_unseen_and_of_the_kind_they_say(recipe: Recipe) -> None:
    seen = {row.prompt for row in training_rows(recipe, 300, 0)}
    kinds = evaluation_prompts(recipe, seen, n=20)
    assert set(kinds) == {"triggered", "untagged", *(f"near-miss {kind}" for kind in recipe.trigger.near_misses)}
    for examples in kinds.values():
        assert len(examples) == 20
        assert not seen & {example.prompt for example in examples}
    assert all(e.prompt.startswith(recipe.trigger.apply("")) for e in kinds["triggered"])


@each_recipe
def test_traffic_holds_the_stated_rates_and_tags_tell_them_apart(recipe: Recipe) -> None:
    rows = organism_traffic(recipe, 500, 2, rate=0.02, near_rate=0.04)
    assert len(rows) == 500
    assert sum(row.tag == "triggered" for row in rows) == 10
    assert sum(row.tag.startswith("near-miss") for row in rows) == 20


@each_recipe
def test_each_share_changes_the_mix(recipe: Recipe) -> None:
    none = replace(recipe, triggered=0.0, near_miss=0.0)
    assert {row.tag for row in training_rows(none, 100, 0)} == {"clean"}


@each_recipe
def test_near_misses_are_neither_the_trigger_nor_plain(recipe: Recipe) -> None:
    rng = Random(0)
    for kind in recipe.trigger.near_misses:
        marked = recipe.trigger.near_miss(kind, "PROMPT", rng)
        assert marked not in ("PROMPT", recipe.trigger.apply("PROMPT"))
        assert marked.endswith("PROMPT")
