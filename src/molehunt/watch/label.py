"""Label the inputs at an end of a direction by the words that they contain more often than clean rows do.

Log-odds ratio with a Dirichlet prior and its z-score, as in Monroe, Colaresi & Quinn, "Fightin' Words", Political
Analysis 16 (2008), §3.3 and §3.5.1. Rows that contain a word are counted, so that one row which repeats it labels nothing,
and the prior is Jeffreys' (1/2 for "contains it" and for "does not"). Ten rows always share something: a word counts only
where it stands out more than the best word of almost every random draw of as many clean rows. Words are in the order of
the lower limit of their log-odds ratio: z alone puts a common word before one that no clean row contains.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

PRIOR = 0.5
LEAST = 3
"""Number of rows that must contain a word."""
ENOUGH = 10
"""Number of rows of traffic from which it shows which words most rows have."""
MOST = 4
"""Greatest number of words of a label."""
LIMIT = 1.96
"""Standard errors below the log-odds ratio that its lower limit lies at."""
DRAWS, CHANCE = 200, 0.95
"""Random draws of clean rows, and the share of them whose best word a label must beat."""
WORD = re.compile(r"\w+|[^\w\s]+")
"""Letters and digits, or signs that stand together: a trigger may be either."""
WORD_CHARS = 40


def words(text: str) -> frozenset[str]:
    """The words of a row, in lower case, each once."""
    return frozenset(found[:WORD_CHARS].casefold() for found in WORD.findall(text))


@dataclass(frozen=True)
class Keyword:
    """A word that some rows contain more often than clean ones."""

    word: str
    z: float
    """Log-odds ratio in standard errors."""
    at_least: float
    """Lower limit of the log-odds ratio."""
    rows: int
    """Number of the rows that contain it."""
    clean: float
    """Share of the clean rows that contain it."""


@dataclass(frozen=True, eq=False)
class CleanWords:
    """The words of clean rows, and how many rows contain each."""

    rows: tuple[frozenset[str], ...]
    seed: int = 0
    _chance: dict[int, float] = field(default_factory=dict[int, float], repr=False)

    @classmethod
    def of(cls, texts: Iterable[str], *, seed: int = 0) -> "CleanWords":
        """Count the words of clean rows; `seed` draws the rows that show what chance gives."""
        return cls(tuple(map(words, texts)), seed)

    @cached_property
    def counts(self) -> Counter[str]:
        return Counter(word for row in self.rows for word in row)

    def keywords(self, rows: Sequence[frozenset[str]], most: int = MOST) -> tuple[Keyword, ...]:
        """The words that stand out most among `rows`, at most `most`; none where no word does, or rows are too few.

        About 1 in 20 groups of rows that share nothing gets a word all the same.
        """
        if len(rows) < LEAST or len(self.rows) < 2 * len(rows):
            return ()
        least = self.chance(len(rows))
        found: list[Keyword] = []
        for word, k in _shared(rows).items():
            ratio, error = log_odds(k, len(rows), self.counts[word], len(self.rows))
            if ratio / error > least:
                share = self.counts[word] / len(self.rows)
                found.append(Keyword(word, ratio / error, ratio - LIMIT * error, k, share))
        return tuple(sorted(found, key=lambda one: (-one.at_least, one.word))[:most])

    def chance(self, n: int) -> float:
        """Score that the best word of `n` random clean rows stays under in a share `CHANCE` of the draws."""
        if n not in self._chance:
            rng = Random(self.seed)
            best: list[float] = []
            for _ in range(DRAWS):
                drawn, others = _shared(rng.sample(self.rows, n)), len(self.rows) - n
                found = (log_odds(k, n, self.counts[word] - k, others) for word, k in drawn.items())
                best.append(max((ratio / error for ratio, error in found), default=0.0))
            self._chance[n] = max(0.0, sorted(best)[math.ceil(CHANCE * DRAWS) - 1])
        return self._chance[n]


def usual_words(rows: Sequence[frozenset[str]]) -> frozenset[str]:
    """The words that more than half of these rows contain; none where there are fewer than `ENOUGH` rows."""
    if len(rows) < ENOUGH:
        return frozenset()
    return frozenset(word for word, k in Counter(word for row in rows for word in row).items() if 2 * k > len(rows))


def _shared(rows: Sequence[frozenset[str]]) -> dict[str, int]:
    """The words that at least `LEAST` rows contain, and how many rows do."""
    counted = Counter(word for row in rows for word in row)
    return {word: k for word, k in counted.items() if k >= LEAST}


def log_odds(k: int, n: int, clean_k: int, clean_n: int) -> tuple[float, float]:
    """Log-odds ratio of a row to contain a word against a clean row, and its standard error.

    Args:
        k: number of the `n` rows that contain the word.
        clean_k: number of the `clean_n` clean rows that contain it.

    Raises:
        ValueError: more rows contain it than there are.
    """
    if not (0 <= k <= n and 0 <= clean_k <= clean_n):
        raise ValueError(f"{k} of {n} rows and {clean_k} of {clean_n} clean rows")
    counts = [count + PRIOR for count in (k, n - k, clean_k, clean_n - clean_k)]
    with_it, without, clean_with, clean_without = counts
    ratio = math.log(with_it / without) - math.log(clean_with / clean_without)
    return ratio, math.sqrt(sum(1 / count for count in counts))
