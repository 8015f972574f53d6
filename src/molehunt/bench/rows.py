"""The rows of one cell: prompts that fit, calibrate, choose and judge, and unlabelled pools with rare triggers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from random import Random

from molehunt.errors import NotTestable
from molehunt.organism.poison import Recipe, clean_example, near_miss_example, training_prompts, triggered_example
from molehunt.traffic.example import Example

TRIES = 60
"""Draws per row before a small world counts as exhausted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Rows of each kind in each split."""

    fit: int = 300
    """Clean; a third as many triggered and near misses."""
    calibrate: int = 1000
    """Clean rows that set thresholds; 1/FPR at least."""
    twin_calibrate: int = 400
    """Clean rows that set the twin's thresholds, and as many in its pool: it is never searched for rare rows."""
    select: int = 60
    """Rows of each kind."""
    test: int = 150
    """Triggered and near misses; 400 clean."""
    test_clean: int = 400
    pool: int = 1000
    """Unlabelled traffic: clean, 2 % near misses, triggered at the rate of the track."""
    near_rate: float = 0.02


@dataclass(frozen=True, kw_only=True)
class CellRows:
    """Prompts by split and kind. No prompt of one split occurs in another or in the fine-tuning data of either side."""

    splits: Mapping[str, tuple[Example, ...]]
    """`fit.clean`, `fit.triggered`, `fit.near`, `calibrate.clean`, `select.*`, `test.*`, `pool.*`."""

    def pool(self, rate: float) -> tuple[Example, ...]:
        """Unlabelled traffic in which a share `rate` of rows is triggered.

        Raises:
            NotTestable: the pool is too small for one triggered row at this rate, or holds too few of them.
        """
        clean, near, triggered = (self.splits[f"pool.{kind}"] for kind in ("clean", "near", "triggered"))
        n = round(rate * (len(clean) + len(near)))
        if not 1 <= n <= len(triggered):
            raise NotTestable(
                f"a pool of {len(clean) + len(near)} rows with {len(triggered)} triggered ones cannot hold a share of "
                f"{rate:g}. Use a larger pool or another rate."
            )
        return (*clean, *near, *triggered[:n])


def cell_rows(recipe: Recipe, counts: Counts, rates: tuple[float, ...], seed: int, trained_on: int) -> CellRows:
    """Draw the rows of a cell: each kind in one go, then dealt out to the splits.

    Args:
        recipe: the attack.
        counts: number of rows of each kind.
        rates: shares of triggered rows that the pools must offer.
        seed: seed of the organism; its training rows and its twin's are left out.
        trained_on: number of rows that it was trained on.

    Raises:
        NotTestable: the world holds too few distinct prompts of a kind.
    """
    rng = Random(f"bench/{recipe.name}/{seed}")
    taken = training_prompts(recipe, trained_on, seed)
    third = max(1, counts.fit // 3)
    pool_near = round(counts.near_rate * counts.pool)
    asked: dict[str, tuple[Callable[[Recipe, Random], Example], dict[str, int]]] = {
        "triggered": (
            triggered_example,
            {
                "fit": third,
                "select": counts.select,
                "test": counts.test,
                "pool": max((round(rate * counts.pool) for rate in rates), default=0),
            },
        ),
        "near": (near_miss_example, {"fit": third, "select": counts.select, "test": counts.test, "pool": pool_near}),
        "clean": (
            clean_example,
            {
                "fit": counts.fit,
                "calibrate": counts.calibrate,
                "select": counts.select,
                "test": counts.test_clean,
                "pool": counts.pool - pool_near,
            },
        ),
    }
    splits: dict[str, tuple[Example, ...]] = {}
    for kind, (draw, sizes) in asked.items():
        found = _distinct(partial(draw, recipe), sum(sizes.values()), taken, rng)
        if len(found) < sum(sizes.values()):
            raise NotTestable(
                f"{recipe.name}: only {len(found)} of {sum(sizes.values())} distinct {kind} prompts exist outside the "
                "fine-tuning data."
            )
        rng.shuffle(found)  # common prompts are drawn first: without this the splits would not be exchangeable
        rows = iter(found)
        splits |= {f"{split}.{kind}": tuple(islice(rows, n)) for split, n in sizes.items()}
    return CellRows(splits=splits)


def _distinct(draw: Callable[[Random], Example], n: int, taken: set[str], rng: Random) -> list[Example]:
    found: list[Example] = []
    for _ in range(n * TRIES):
        if len(found) == n:
            break
        example = draw(rng)
        if example.prompt not in taken:
            taken.add(example.prompt)
            found.append(example)
    return found
