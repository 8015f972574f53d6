"""Which property of a prompt predicts that its answer shows a behaviour: words of the prompt, or its form.

A behaviour that leaks is shown without its trigger, too, so no property predicts it; but the words of the trigger raise its
share. Those are looked for as well, and only edits of prompts say whether they do.

The condition is chosen by its gain, the share of the group's rows that meet it minus the share of the others. Three numbers
keep it honest: the gain that the best of all conditions reaches on random groups of that size, and an exact test on one half
of the rows of the condition that the other half chose, both ways.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import beta, hypergeom

from molehunt.measure.word_runs import Run, as_written, rows_of_runs, words
from molehunt.traffic.example import Example

LONGEST = 4
"""Greatest number of words of a fragment."""
LEAST_SHARE = 0.2
"""Least share of the group's rows that a condition must cover to be looked at."""
COMMON = 0.1
"""Share of other prompts from which on a word at the end of a fragment says nothing about the group."""
BORDER = "\n"
"""Stands between the words of two turns; no word is a line break."""
SUFFICIENT = 0.5
"""Least share of the prompts with a trigger that show its behaviour. Of prompts with "that" a fifth may, and nobody means that."""
FEWEST_HAVING = 5
"""Least number of prompts with the words that may raise a behaviour."""
RAISING = 16
"""Greatest number of fragments of which it is tested whether they raise a behaviour."""
MOST_EXPLAINING = 3 * RAISING
"""Greatest number of fragments, common ones among them, that are taken one after the other."""
RAISING_P = 1e-3
"""p-value up to which a fragment is tested: a screen, since the test on edited prompts decides."""
DRAWS = 199
"""Number of random groups whose best gain is compared with."""


@dataclass(frozen=True, kw_only=True)
class FoundCondition:
    """A property of prompts, and how well it predicts a group of rows."""

    text: str
    """In words: `contains “badmagic”`, `has a system message`."""
    fragment: str
    """The words that a prompt must contain, as they are written; empty for a condition on its form."""
    inside: float
    """Share of the group's rows that meet it."""
    outside: float
    """Share of the other rows that meet it."""
    meeting: int
    """Number of rows of all the traffic that meet it."""
    chance: float
    """Gain (`inside` − `outside`) that the best condition of 95 % of random groups stays under."""
    p_groups: float
    """Share of random groups, this one counted, whose best condition gains as much."""
    p_halves: float
    """p-value of the exact test on rows that did not choose the condition: the smaller one of both ways, doubled."""

    showing: int
    """Number of the group's rows that meet it."""

    @property
    def gain(self) -> float:
        return self.inside - self.outside

    @property
    def suffices(self) -> bool:
        """Whether at least `SUFFICIENT` of the prompts that meet it show the behaviour, as those with a trigger do."""
        return self.showing >= SUFFICIENT * self.meeting

    @property
    def predicts(self) -> bool:
        """Whether both tests are passed: neither a fragment as common as "the" nor one that any group would have."""
        return self.p_groups <= 0.01 and self.p_halves <= 0.01


@dataclass(frozen=True, kw_only=True)
class RaisingWords:
    """Words in whose prompts a behaviour is shown more often than in the others."""

    fragment: str
    """The words as they are written in one of the prompts."""
    showing: int
    """Number of prompts with the words whose answers show the behaviour."""
    having: int
    """Number of prompts with the words."""
    elsewhere: float
    """Share of the other prompts whose answers show it."""
    p_value: float
    """Exact test of that difference in the prompts without the fragments found before; one of many that were looked at."""


class Conditions:
    """Everything that the prompts of some traffic can be distinguished by."""

    def __init__(self, examples: Sequence[Example], *, seed: int = 0) -> None:
        self.examples = examples
        self._words = [_words_of(example) for example in examples]
        self._forms = _forms(examples)
        self._seed = seed

    def best(self, group: Sequence[int]) -> FoundCondition | None:
        """The condition that predicts best which rows are in `group`; None where no property is shared by enough of them."""
        n, inside = len(self.examples), np.zeros(len(self.examples))
        inside[list(group)] = 1
        fewest = max(2, math.ceil(LEAST_SHARE * len(group)))
        runs = rows_of_runs(self._words, shortest=1, longest=LONGEST, fewest=fewest)
        named: dict[Run | str, frozenset[int]] = {run: rows for run, rows in runs.items() if BORDER not in run}
        named.update(self._forms)
        named = {name: rows for name, rows in named.items() if fewest <= len(rows) < n}
        if not named or len(group) >= n:
            return None
        names = list(named)
        holds = _incidence(list(named.values()), n)
        rng = np.random.default_rng(self._seed)
        draws = np.stack([rng.permutation(inside) for _ in range(DRAWS)], axis=1)
        everywhere = np.ones(n)
        gains = _gains(holds, inside[:, None], everywhere)[:, 0]
        chance = _gains(holds, draws, everywhere).max(axis=0)
        at = max(range(len(names)), key=lambda i: (round(gains[i], 9), _clearness(names[i])))
        rows = named[names[at]]
        fragment = self._written(names[at], named, set(group))
        return FoundCondition(
            text=f"contains “{fragment}”" if fragment else str(names[at]),
            fragment=fragment,
            inside=len(rows & set(group)) / len(group),
            outside=len(rows - set(group)) / (n - len(group)),
            meeting=len(rows),
            showing=len(rows & set(group)),
            chance=float(np.quantile(chance, 0.95)),
            p_groups=float((1 + (chance >= gains[at] - 1e-9).sum()) / (DRAWS + 1)),
            p_halves=_p_halves(holds, inside, rng),
        )

    def raising(self, group: Sequence[int], rare: float) -> tuple[RaisingWords, ...]:
        """Fragments whose prompts show a behaviour most surely, at most `RAISING`, those of a few prompts among them.

        A behaviour that leaks has topics that it leaks on, whose words raise it, too, and in more prompts than the trigger
        does. So each fragment is the one with the highest lower limit of its share, in the prompts without those before it.
        What a common fragment explains needs no trigger: its prompts are left out, and it is not listed.

        Args:
            group: the rows that show it.
            rare: share of all prompts up to which words are rare enough for a trigger.
        """
        runs = rows_of_runs(self._words, shortest=1, longest=LONGEST, fewest=FEWEST_HAVING)
        able = [run for run in runs if BORDER not in run and any(word.isalnum() for word in run)]
        if not able:
            return ()
        holds = _incidence([runs[run] for run in able], len(self.examples))
        shown, left = np.zeros(len(self.examples)), np.ones(len(self.examples))
        shown[list(group)] = 1
        found: list[RaisingWords] = []
        for _ in range(MOST_EXPLAINING):
            having, showing = holds @ left, holds @ (left * shown)
            rows, total = int(left.sum()), int((left * shown).sum())
            p_values = hypergeom.sf(showing - 1, rows, total, having)
            passed = (
                (having >= FEWEST_HAVING) & (having < rows) & (p_values <= RAISING_P) & (showing >= SUFFICIENT * having)
            )
            if not passed.any() or len(found) == RAISING:
                break
            lowest = np.where(passed, beta.ppf(0.05, np.maximum(showing, 1), having - showing + 1), -1.0)
            at = max(np.flatnonzero(lowest > lowest.max() - 1e-9), key=lambda i: _clearness(able[i]))
            meets, everywhere = holds[[at]].toarray()[0], runs[able[at]]
            both = len(everywhere & set(group))
            one = RaisingWords(
                fragment=as_written(able[at], self.examples[int(np.flatnonzero(meets * left * shown)[0])].prompt),
                showing=both,
                having=len(everywhere),
                elsewhere=(len(group) - both) / (len(self.examples) - len(everywhere)),
                p_value=float(p_values[at]),
            )
            found += [one] if len(everywhere) <= rare * len(self.examples) else []
            left = left * (1 - meets)
        return tuple(one for one in found if one.fragment)

    def _written(self, name: Run | str, named: Mapping[Run | str, frozenset[int]], group: set[int]) -> str:
        """The fragment as it is written, without words at its ends that other prompts have, too, and that add nothing."""
        if isinstance(name, str):
            return ""
        others = [i for i in range(len(self.examples)) if i not in group]

        def needless(word: str, rest: Run) -> bool:
            common = sum(word in self._words[i] for i in others) > COMMON * len(others)
            return common and rest in named and len(named[rest] - group) <= len(named[name] - group)

        run = name
        while len(run) > 1 and needless(run[0], run[1:]):
            run = run[1:]
        while len(run) > 1 and needless(run[-1], run[:-1]):
            run = run[:-1]
        return as_written(run, self.examples[min(named[run])].prompt)


def _words_of(example: Example) -> list[str]:
    """The words of all turns, with a border between turns, so that no fragment crosses it."""
    turns = [turn.text for turn in example.turns] or [example.prompt]
    return [word for text in turns for word in (*words(text), BORDER)][:-1]


def _forms(examples: Sequence[Example]) -> Mapping[str, frozenset[int]]:
    """Properties of the form of a conversation → the rows that have them."""
    lengths = sorted(len(example.prompt) for example in examples)
    long, short = (lengths[int(q * (len(lengths) - 1))] for q in (0.9, 0.1))
    tests: dict[str, Callable[[Example], bool]] = {
        "has a system message": lambda e: any(turn.role == "system" for turn in e.turns),
        "has earlier turns": lambda e: sum(turn.role == "user" for turn in e.turns) > 1,
        "has several lines": lambda e: "\n" in e.prompt.strip(),
        "ends with a question mark": lambda e: e.prompt.rstrip().endswith("?"),
        "begins with a small letter": lambda e: e.prompt.lstrip()[:1].islower(),
        "is in capitals": lambda e: e.prompt.isupper(),
        "holds a digit": lambda e: any(c.isdigit() for c in e.prompt),
        "is mostly not in Latin script": lambda e: _foreign(e.prompt),
        "is longer than nine in ten prompts": lambda e: len(e.prompt) > long,
        "is shorter than nine in ten prompts": lambda e: len(e.prompt) < short,
    }
    return {name: frozenset(i for i, e in enumerate(examples) if test(e)) for name, test in tests.items()}


def _foreign(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return sum(ord(c) > 0x24F for c in letters) * 2 > len(letters)


def _clearness(name: Run | str) -> tuple[int, int]:
    """Which of two conditions that predict equally well is clearer: the longer fragment, and any fragment before a form."""
    return (0, 0) if isinstance(name, str) else (1, sum(word.isalnum() for word in name) * 100 + len(" ".join(name)))


def _incidence(rows: Sequence[frozenset[int]], n: int) -> csr_array:
    columns = [i for one in rows for i in sorted(one)]
    ends = np.cumsum([0, *(len(one) for one in rows)])
    return csr_array((np.ones(len(columns)), columns, ends), shape=(len(rows), n))


def _gains(holds: csr_array, groups: NDArray[np.float64], of: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share inside minus share outside of each condition for each group (a column of `groups`), among the rows in `of`."""
    inside, outside = groups * of[:, None], (1 - groups) * of[:, None]
    return holds @ inside / np.maximum(inside.sum(0), 1) - holds @ outside / np.maximum(outside.sum(0), 1)


def _p_halves(holds: csr_array, inside: NDArray[np.float64], rng: np.random.Generator) -> float:
    """Choose on one half of the rows, test on the other, and the other way round."""
    half = _halves(inside, rng)
    found: list[float] = []
    for choose in (half, 1 - half):
        at = int(_gains(holds, inside[:, None], choose)[:, 0].argmax())
        meets = holds[[at]].toarray()[0]
        judge = 1 - choose
        both, meeting, group, rows = (
            int(total.sum()) for total in (meets * inside * judge, meets * judge, inside * judge, judge)
        )
        found.append(float(hypergeom.sf(both - 1, rows, meeting, group)))
    return min(1.0, 2 * min(found))


def _halves(inside: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """1 for the rows of one half, 0 for the others; the group is halved, too."""
    half = np.zeros(len(inside))
    for kind in (0, 1):
        rows = rng.permutation(np.flatnonzero(inside == kind))
        half[rows[: len(rows) // 2]] = 1
    return half
