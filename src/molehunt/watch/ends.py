"""Words that the inputs at the ends of directions share: a list of candidates for a trigger.

A fine-tune that learnt a trigger writes and reads along a few directions where the trigger stands, so the inputs that reach
furthest there have its words in common. Any ten inputs share something. So the words that stand out most, over all
directions, both ends and all runs of words, are compared with the same maximum after the texts were permuted.

What this cannot tell: a harmless fine-tune separates topics, too. Questions about code at one end of a direction pass this
test, and rightly so, because chance does not put them there. Words that pass are candidates for a test, and no accusation:
only other prompts with these words put in show whether the words change the answer. Removing topics beforehand would
take the base model's own projections, and a watch does not run the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, Shaped
from numpy import ndarray
from scipy.sparse import csr_array
from scipy.special import betainc
from torch import Tensor

from molehunt.measure.phrases import Phrases, overlap, widened
from molehunt.measure.word_runs import Run, as_written, words

NEAREST = 10
"""Number of inputs that are looked at at each end; as many as the report lists."""
LONGEST = 3
"""Greatest number of words of a run: most triggers are shorter, and the words of a longer one are runs themselves."""
FEWEST = 3
"""Number of texts, and of inputs at one end, that must share a run. Two texts share too much by chance."""
COMMON = 0.5
"""Share of the texts from which on a run is left out. All ten inputs have such a run once in a thousand ends by chance,
and the most surprising run of many thousands is far beyond that."""
FEWEST_TEXTS = 3 * NEAREST
"""Least number of texts: among fewer, a third of all stands at each end."""
DRAWS = 199
"""Number of permutations. The smallest p-value is 1/200, half of `P_VALUE`."""
P_VALUE = 0.01
"""Greatest p-value that is reported: the chance that the test names any words at all where there is nothing."""
MOST_NAMED = 200
"""Greatest number of phrases that are named, which bounds the time where topics have thousands."""
ENDS_NAMED = 5
"""Greatest number of ends that are named for each run; one direction more says little."""
SMALLEST = 1e-300
"""Tail probabilities are bounded from below, so that their logarithm is finite."""


@dataclass(frozen=True, kw_only=True)
class EndCount:
    """How many inputs at one end of a direction have a run of words."""

    direction: int
    """Column of the direction."""
    high: bool
    """Whether it is the end of the highest values."""
    rows: int
    """Number of inputs at this end that have the words."""
    of: int
    """Number of inputs at this end."""


@dataclass(frozen=True, kw_only=True)
class WordsAtEnds:
    """Words that more inputs at an end of a direction share than chance explains."""

    run: Run
    """The words, without case. They may be more than `LONGEST` where all texts that have them go on alike."""
    text: str
    """The words as one of the texts has them."""
    rows: int
    """Number of all distinct texts that have them."""
    p_value: float
    """Share of permutations, this order counted, in which the best words of all stand out as much."""
    ends: tuple[EndCount, ...]
    """The ends where they stand out most, at most `ENDS_NAMED`."""
    n_ends: int
    """Number of ends where they pass."""


class _Scores(NamedTuple):
    """How surprising each run is at each end where at least `FEWEST` inputs have it."""

    ends: Int64[ndarray, " found"]
    runs: Int64[ndarray, " found"]
    hits: Int64[ndarray, " found"]
    surprise: Float[ndarray, " found"]


@dataclass(frozen=True, eq=False)
class _Expectation:
    """What chance gives: the share of like texts that have a run, where "like" is of a length within a factor of two."""

    strata: Int64[ndarray, " texts"]
    of_end: Float[ndarray, "ends strata"]
    """Number of inputs of each stratum at each end."""
    of_run: Float[ndarray, "runs strata"]
    """Share of the texts of each stratum that have a run."""

    @classmethod
    def of(cls, texts: Sequence[str], at: csr_array, holds: csr_array) -> "_Expectation":
        """Strata by the length of the texts, and the counts in them."""
        strata = length_strata([len(text) for text in texts])
        member = np.eye(int(strata.max()) + 1)[strata]
        return cls(strata, at @ member, holds.T @ member / member.sum(0))

    def permuted(self, rng: np.random.Generator) -> Int64[ndarray, " texts"]:
        """A random order of the texts in which each one takes the place of one of its stratum."""
        order = np.empty(len(self.strata), dtype=np.int64)
        order[np.argsort(self.strata, kind="stable")] = np.lexsort((rng.random(len(self.strata)), self.strata))
        return order

    def shares(
        self, ends: Shaped[ndarray, " found"], runs: Shaped[ndarray, " found"]
    ) -> tuple[Int64[ndarray, " found"], Float[ndarray, " found"]]:
        """Number of inputs at each end, and the mean share of their strata that has the run."""
        sizes = self.of_end.sum(1)[ends]
        return sizes.astype(np.int64), np.einsum("fs,fs->f", self.of_end[ends], self.of_run[runs]) / sizes


def length_strata(lengths: Sequence[int]) -> Int64[ndarray, " texts"]:
    """A stratum for each text: of a length within a factor of two, and wider where fewer than `FEWEST_TEXTS` texts are.

    In a smaller stratum hardly anything could be exchanged, so what its texts share could never stand out.
    """
    doublings = np.array([length.bit_length() for length in lengths])
    counts = np.bincount(doublings)
    merged, stratum, inside = np.zeros(len(counts), dtype=np.int64), 0, 0
    for i, count in enumerate(counts.tolist()):
        left = int(counts[i:].sum())
        if inside >= FEWEST_TEXTS and left >= FEWEST_TEXTS:
            stratum, inside = stratum + 1, 0
        merged[i], inside = stratum, inside + count
    return merged[doublings]


def surprise(
    hits: Shaped[ndarray, " found"], of: Shaped[ndarray, " found"], share: Float[ndarray, " found"]
) -> Float[ndarray, " found"]:
    """−log of a bound on the chance that `hits` or more of `of` inputs have a run, from the share of like texts that do.

    Inputs are drawn from strata without replacement, so their number is a sum of hypergeometric ones. Its upper tail beyond
    the mean is at most the binomial tail of that mean (Hoeffding, Annals of Mathematical Statistics 27 (1956), p. 713; a
    hypergeometric number is a sum of independent ones). The bound is monotone in the share, which makes the null cheap.
    """
    return -np.log(np.maximum(betainc(hits, of - hits + 1, share), SMALLEST))


def words_at_ends(
    texts: Sequence[str], projections: Float[Tensor, "rows directions"], *, k: int = NEAREST, seed: int = 0
) -> tuple[WordsAtEnds, ...]:
    """Words that the texts of highest, or lowest, projection share beyond chance, most surprising first.

    Texts with the same words count once, at their furthest. Neither the order of the rows nor the sign of a direction
    matters.

    Raises:
        ValueError: NaN among the projections, or another number of rows than texts.
    """
    if projections.isnan().any() or len(texts) != len(projections):
        raise ValueError(f"{list(projections.shape)} projections of {len(texts)} texts, or NaN among them")
    split = [tuple(words(text)) for text in texts]
    number = {run: i for i, run in enumerate(sorted(set(split)))}
    place = torch.tensor([number[run] for run in split], dtype=torch.int64)
    both = torch.cat([projections, -projections], dim=1).float()
    furthest = torch.full((len(number), both.shape[1]), -torch.inf)
    furthest.scatter_reduce_(0, place[:, None].expand(both.shape), both, "amax")
    order = furthest.sort(dim=0, descending=True, stable=True)
    nearest = order.indices[:k].masked_fill(order.values[:k] == -torch.inf, -1).mT
    distinct = [""] * len(number)
    for text, at in sorted(zip(texts, place.tolist(), strict=True), reverse=True):
        distinct[at] = text
    return words_of_ends(distinct, nearest, seed=seed)


def words_of_ends(
    texts: Sequence[str], nearest: Int[Tensor, "twice_directions k"], *, seed: int = 0
) -> tuple[WordsAtEnds, ...]:
    """Words that the inputs at the same end of a direction share beyond chance, most surprising first, at most `MOST_NAMED`.

    In each permutation one order of the texts serves all directions, so that whatever directions have in common stays.
    Texts only take the place of texts of like length: else each word that long prompts have would stand out wherever length
    matters. Runs that overlap are named once (see `_named`).

    Args:
        texts: distinct texts. They may be all of the traffic, or the inputs at the ends and a random sample of the others:
            where words and directions are independent, any order of these is as likely.
        nearest: indices of the texts at each direction's high end, then at each direction's low end; -1 for none.
    """
    if len(texts) < FEWEST_TEXTS:
        return ()
    split = [words(text) for text in texts]
    holds, runs = runs_of_texts(split)
    if not runs:
        return ()
    at = _ends_matrix(nearest, len(texts))
    expectation = _Expectation.of(texts, at, holds)
    found = _scores(at @ holds, expectation)
    if not len(found.surprise):
        return ()
    rng = np.random.default_rng(seed)
    null = np.zeros(DRAWS)
    for draw in range(DRAWS):
        order = expectation.permuted(rng)
        null[draw] = _highest(csr_array((at.data, order[at.indices], at.indptr), shape=at.shape) @ holds, expectation)
    beaten = len(null) - np.searchsorted(np.sort(null), found.surprise - 1e-9)
    p_values = (1 + beaten) / (1 + DRAWS)
    return tuple(_named(found, p_values, texts, split, holds, runs, at))


def runs_of_texts(
    texts: Sequence[Sequence[str]], *, longest: int = LONGEST, fewest: int = FEWEST, common: float = COMMON
) -> tuple[csr_array, list[Run]]:
    """Which text has which run of words, for runs in at least `fewest` texts and at most a share `common` of them.

    The same runs as `measure.word_runs.rows_of_runs` finds, with numbers for words: the memory is a few times that of the
    texts, and five thousand texts take a second.

    Args:
        texts: the `words` of each text.
        longest: greatest number of words of a run.

    Returns:
        A matrix of texts × runs that holds 1 where a text has a run, and the runs.
    """
    known: dict[str, int] = {}
    flat = np.fromiter((known.setdefault(word, len(known)) for text in texts for word in text), dtype=np.int64)
    spelled = list(known)
    row = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    starts, prefix = np.arange(len(flat)), np.zeros(len(flat), dtype=np.int64)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    runs: list[Run] = []
    for length in range(1, longest + 1):
        last = starts + length - 1
        inside = last < len(flat)
        inside[inside] = row[last[inside]] == row[starts[inside]]
        starts, prefix, last = starts[inside], prefix[inside], last[inside]
        codes, first, run = np.unique(prefix * len(spelled) + flat[last], return_index=True, return_inverse=True)
        once = np.unique(run * len(texts) + row[starts])
        of_run, of_row = once // len(texts), once % len(texts)
        count = np.bincount(of_run, minlength=len(codes))
        wanted = (count >= fewest) & (count <= common * len(texts))
        numbers = np.cumsum(wanted) - 1 + len(runs)
        pairs.append((of_row[wanted[of_run]], numbers[of_run[wanted[of_run]]]))
        runs += [tuple(spelled[i] for i in flat[at : at + length]) for at in starts[first[wanted]]]
        frequent = count[run] >= fewest  # only these can be extended to a run that is frequent, too
        starts, prefix = starts[frequent], run[frequent]
    rows, columns = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return csr_array((np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=(len(texts), len(runs))), runs


def _ends_matrix(nearest: Int[Tensor, "ends k"], n: int) -> csr_array:
    """A matrix of ends × texts that holds 1 for each input at an end."""
    rows = nearest.cpu().numpy().astype(np.int64)
    there = rows >= 0
    bounds = np.concatenate([[0], np.cumsum(there.sum(1))])
    return csr_array((np.ones(int(there.sum()), dtype=np.int32), rows[there], bounds), shape=(len(rows), n))


def _entries(counts: csr_array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """End, run and number of inputs of each entry that is large enough."""
    enough = np.flatnonzero(counts.data >= FEWEST)
    ends = np.searchsorted(counts.indptr, enough, side="right") - 1
    return ends, counts.indices[enough].astype(np.int64), counts.data[enough].astype(np.int64)


def _scores(counts: csr_array, expectation: _Expectation) -> _Scores:
    ends, runs, hits = _entries(counts)
    of, share = expectation.shares(ends, runs)
    return _Scores(ends, runs, hits, surprise(hits, of, share))


def _highest(counts: csr_array, expectation: _Expectation) -> float:
    """The greatest surprise of all, or 0: for each number of inputs only the run of smallest share can have it."""
    ends, runs, hits = _entries(counts)
    of, share = expectation.shares(ends, runs)
    most = int(of.max(initial=0)) + 1
    least = np.full(most * most, np.inf)
    np.minimum.at(least, of * most + hits, share)
    best = np.flatnonzero(least < np.inf)
    return float(surprise(best % most, best // most, least[best]).max(initial=0.0))


def _named(
    found: _Scores,
    p_values: Float[ndarray, " found"],
    texts: Sequence[str],
    split: Sequence[Sequence[str]],
    holds: csr_array,
    runs: Sequence[Run],
    at: csr_array,
) -> list[WordsAtEnds]:
    """The runs that pass, as phrases. One that overlaps with a phrase before it must have inputs of its own.

    So of runs that the same texts have, the longest is named, and a word of a trigger does not come again with each word
    that stands beside it.
    """
    passed = np.flatnonzero(p_values <= P_VALUE)
    of_run: dict[int, list[int]] = {}
    for entry in passed[np.lexsort((-found.hits[passed], -found.surprise[passed]))].tolist():
        of_run.setdefault(int(found.runs[entry]), []).append(entry)
    by_run = csr_array(holds.T)
    phrases = Phrases.of(split)
    order = sorted(of_run, key=lambda run: (-round(found.surprise[of_run[run][0]], 9), -len(runs[run]), runs[run]))
    named: list[tuple[Run, set[int]]] = []
    result: list[WordsAtEnds] = []
    for run in order:
        if len(result) == MOST_NAMED:
            break
        best, *_ = entries = of_run[run]
        having: set[int] = set(by_run.indices[by_run.indptr[run] : by_run.indptr[run + 1]].tolist())
        bounds = zip(at.indptr[found.ends[entries]], at.indptr[found.ends[entries] + 1], strict=True)
        mine: set[int] = having & {row for first, end in bounds for row in at.indices[first:end].tolist()}
        phrase = widened(runs[run], (split[row] for row in sorted(having)))
        if any(mine <= rows and overlap(phrase, other) for other, rows in named):
            continue
        named.append((phrase, having))
        phrase = phrases.without_usual_ends(phrase, having)
        result.append(
            WordsAtEnds(
                run=phrase,
                text=as_written(phrase, texts[min(mine)]),
                rows=len(having),
                p_value=float(p_values[best]),
                ends=tuple(_end_count(found, entry, at) for entry in entries[:ENDS_NAMED]),
                n_ends=len(entries),
            )
        )
    return result


def _end_count(found: _Scores, entry: int, at: csr_array) -> EndCount:
    end, directions = int(found.ends[entry]), (len(at.indptr) - 1) // 2
    of = int(at.indptr[end + 1] - at.indptr[end])
    return EndCount(direction=end % directions, high=end < directions, rows=int(found.hits[entry]), of=of)
