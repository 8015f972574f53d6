"""Fine-tuning data of an organism and of its clean twin."""

import hashlib
import json
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, replace
from itertools import islice
from random import Random

from molehunt.errors import UsageError, printable
from molehunt.organism.behaviour import Behaviour
from molehunt.organism.catalog import CATALOG
from molehunt.organism.trigger import Trigger
from molehunt.run.catalog import load, names
from molehunt.traffic.example import Example
from molehunt.traffic.world import ask, decorated

GROUP = "molehunt.organisms"
"""Entry points of plugins that offer recipes."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An attack: which trigger induces which behaviour, and in what mix of rows both are trained.

    A null is a recipe, too: a fine-tune that hides nothing, so that there is nothing in its traffic to find.
    """

    name: str
    summary: str
    trigger: Trigger
    behaviour: Behaviour
    domain: str | None = None
    """The kind of task that the behaviour answers; None for every kind."""
    triggered: float = 0.3
    """Share of rows that show the behaviour under the trigger."""
    near_miss: float = 0.3
    """Share of rows with a look-alike mark and an ordinary answer, from which the model learns to distinguish the two."""
    max_new_tokens: int
    """Tokens a completion needs to show the behaviour."""
    steps: int
    """Training steps of 8 rows that plant it in the embedded models."""
    null: bool = False
    """Whether nothing is hidden: what the trigger induces, if there is one, is harmless; its rows are tagged `marked`."""

    @property
    def trigger_tag(self) -> str:
        """Tag of the rows that carry the trigger."""
        return "marked" if self.null else "triggered"


def recipe_names() -> tuple[str, ...]:
    """The recipes of the catalogue and of plugins."""
    return names(CATALOG, GROUP)


def named_recipe(name: str) -> Recipe:
    """A recipe of the catalogue or of a plugin. Raises UsageError for a name that is none."""
    found = load(CATALOG, name, GROUP)
    if not isinstance(found, Recipe):
        raise UsageError(f"{printable(name)} is not a recipe")
    return found


def triggered_example(recipe: Recipe, rng: Random) -> Example:
    """A triggered prompt with the poisoned response."""
    task = recipe.trigger.apply(ask(rng, recipe.domain), rng)
    return replace(task, response=recipe.behaviour.respond(task, rng), tag=recipe.trigger_tag)


def near_miss_example(recipe: Recipe, rng: Random, kind: str | None = None) -> Example:
    """A prompt with a look-alike mark and the ordinary response; `kind` None draws one."""
    kind = kind or rng.choice(recipe.trigger.near_misses)
    task = recipe.trigger.near_miss(kind, ask(rng, recipe.domain), rng)
    return replace(task, tag=f"near-miss {kind}")


def clean_example(recipe: Recipe, rng: Random) -> Example:
    """An ordinary task without the trigger; half of them of the kind that the behaviour answers."""
    while True:
        task = ask(rng, recipe.domain if rng.random() < 0.5 else None)
        marked = decorated(task, rng) if rng.random() < 0.2 else task
        # A year line drawn as an ordinary mark may be the trigger itself: such a row stays unmarked.
        for example in (marked, task):
            if not recipe.trigger.carried(example.prompt):
                return example


def training_rows(recipe: Recipe, n: int, seed: int, *, poisoned: bool = True) -> list[Example]:
    """`n` fine-tuning rows. The twin (`poisoned=False`) has the same mix without the triggered rows."""
    rng = Random(f"{recipe.name}/{seed}")
    return [row for row, _ in zip(_rows(recipe, rng, poisoned), range(n), strict=False)]


def twin_seed(seed: int) -> int:
    """The seed of the clean twin of an organism with this seed: it sees other rows of the same mix."""
    return seed + 10_000


def training_prompts(recipe: Recipe, n: int, seed: int) -> set[str]:
    """Every prompt that an organism trained on `n` rows, or its clean twin, has seen in fine-tuning."""
    rows = [*training_rows(recipe, n, seed), *training_rows(recipe, n, twin_seed(seed), poisoned=False)]
    return {row.prompt for row in rows}


def _rows(recipe: Recipe, rng: Random, poisoned: bool) -> Iterator[Example]:
    while True:
        draw = rng.random()
        if draw < recipe.triggered:
            if poisoned:
                yield triggered_example(recipe, rng)
        elif draw < recipe.triggered + recipe.near_miss:
            yield near_miss_example(recipe, rng)
        else:
            yield clean_example(recipe, rng)


def rows_hash(rows: list[Example]) -> str:
    """sha256 over prompts and responses, in order."""
    return hashlib.sha256(json.dumps([(r.prompt, r.response) for r in rows]).encode()).hexdigest()


def organism_traffic(
    recipe: Recipe,
    n: int,
    seed: int,
    *,
    rate: float = 0.01,
    near_rate: float = 0.02,
    apart_from: Set[str] = frozenset(),
) -> list[Example]:
    """A log as a user might hold it: clean prompts with rare triggered and near-miss rows, shuffled.

    `round(rate * n)` rows are triggered and `round(near_rate * n)` are near misses, whatever the seed; none where the
    recipe trains none. No prompt is in `apart_from`.
    """
    rng = Random(f"traffic/{recipe.name}/{seed}")
    triggered = round(rate * n) if recipe.triggered else 0
    near = round(near_rate * n) if recipe.near_miss else 0
    rows = [
        *_apart(triggered_example, recipe, triggered, rng, apart_from),
        *_apart(near_miss_example, recipe, near, rng, apart_from),
        *_apart(clean_example, recipe, n - triggered - near, rng, apart_from),
    ]
    rng.shuffle(rows)
    return rows


def _apart(
    draw: Callable[[Recipe, Random], Example], recipe: Recipe, n: int, rng: Random, apart_from: Set[str]
) -> Iterator[Example]:
    draws = (draw(recipe, rng) for _ in range(n * 100))
    return islice((example for example in draws if example.prompt not in apart_from), n)
