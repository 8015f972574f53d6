"""The rows of the switch table, and the texts that its maps are fitted to."""

from collections.abc import Generator
from dataclasses import dataclass
from random import Random

from experiments.setting import Setting
from molehunt.bench.grid import Cell
from molehunt.errors import NotTestable
from molehunt.model.pair import ModelPair
from molehunt.organism.poison import Recipe, clean_example, training_prompts, triggered_example
from molehunt.traffic.chat import prompt_text
from molehunt.traffic.example import Example
from molehunt.traffic.questions import world_questions
from molehunt.traffic.world import ask
from molehunt.transfer.alignment import Aligned, align

SEED = 60_000
DRAWN = 20_000
"""Number of draws of triggered prompts."""


@dataclass(frozen=True, kw_only=True)
class Size:
    fit: int
    """Number of texts that maps are fitted to, in thirds: clean, triggered with the behaviour, triggered with an ordinary answer."""
    held_out: int
    """Number of texts that penalties and ranks are chosen by."""
    triggered: int
    """Number of triggered test prompts."""
    each: int
    """Number of test questions of each of the six kinds."""
    select: int
    """Number of rows of either sort that choose the block."""


PUBLISHED = Size(fit=900, held_out=180, triggered=200, each=50, select=60)
QUICK = Size(fit=90, held_out=30, triggered=12, each=4, select=12)


def size_of(setting: Setting) -> Size:
    return QUICK if setting.quick else PUBLISHED


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Prompts that nothing is fitted to."""

    triggered: tuple[str, ...]
    plain: tuple[str, ...]
    """The same tasks without the trigger."""
    questions: tuple[Example, ...]


def drawn(cell: Cell, size: Size) -> tuple[Rows, Rows, int]:
    """Test rows, rows to choose a block by, and how many triggered test prompts were in fine-tuning data.

    Prompts that the organism was trained on are taken only where no others are left.
    """
    recipe = cell.recipe()
    taught = training_prompts(recipe, cell.plant_config().rows, cell.seed)
    questions = world_questions(size.each, seed=SEED)
    used = {one.prompt for one in questions}
    others = world_questions(size.select // 6, seed=SEED + 1, apart_from=used)
    rng, found = Random(SEED), dict[str, str]()
    for apart in (taught, set[str]()):
        for _ in range(DRAWN):
            if len(found) == size.triggered + size.select:
                break
            task = ask(rng, recipe.domain)
            marked = recipe.trigger.apply(task, rng).prompt
            if marked not in apart:
                found.setdefault(marked, task.prompt)
    if len(found) < size.triggered + size.select:
        raise NotTestable(f"{recipe.name}: the world holds only {len(found)} triggered prompts")
    dealt = list(found.items())
    rng.shuffle(dealt)
    marked, plain = (tuple(some) for some in zip(*dealt, strict=True))
    test = Rows(triggered=marked[: size.triggered], plain=plain[: size.triggered], questions=tuple(questions))
    select = Rows(triggered=marked[size.triggered :], plain=plain[size.triggered :], questions=tuple(others))
    return test, select, sum(prompt in taught for prompt in test.triggered)


def fitting_texts(pair: ModelPair, recipe: Recipe, size: Size, *kept: Rows) -> Generator[list[Aligned], None, None]:
    """Texts to fit to and to choose penalties by: clean ones, and triggered ones with the behaviour and without it."""
    apart = {prompt for rows in kept for prompt in (*rows.triggered, *rows.plain)}
    apart |= {one.prompt for rows in kept for one in rows.questions}

    def ordinary(recipe: Recipe, rng: Random) -> Example:
        return recipe.trigger.apply(ask(rng, recipe.domain), rng)

    draws = (clean_example, triggered_example, ordinary)
    for n in (size.fit, size.held_out):
        rng, found = Random(SEED + n), list[Aligned]()
        while len(found) < n:
            row = draws[len(found) % 3](recipe, rng)
            if row.prompt not in apart:
                text = prompt_text(pair.tokenizer, row.prompt) + (row.response or "")
                found.append(align(pair.tokenizer, pair.tokenizer, text))
        yield found
