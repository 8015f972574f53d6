"""Phrases around runs of words."""

import pytest

from molehunt.measure.phrases import LONGEST_NAMED, Phrases, delimited, overlap, widened
from molehunt.measure.word_runs import words


@pytest.mark.parametrize(
    ("run", "texts", "expected"),
    [
        ("b", ["a b c d", "x a b c e", "a b c"], "a b c"),
        ("b", ["a b c", "b c"], "b c"),
        ("b", ["a b"], "a b"),
        ("b c", ["a b c x b c", "a b c y"], "a b c"),
        ("x", [" ".join(f"m{i}" for i in range(40)) + " x"] * 2, " ".join(f"m{i}" for i in range(25, 40)) + " x"),
        ("x", ["x " + " ".join(f"m{i}" for i in range(40))] * 2, "x " + " ".join(f"m{i}" for i in range(15))),
    ],
)
def test_a_run_is_widened_to_what_all_its_texts_share(run: str, texts: list[str], expected: str) -> None:
    found = widened(tuple(words(run)), [words(text) for text in texts])
    assert " ".join(found) == expected and len(found) <= LONGEST_NAMED


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("a b", "b c", True), ("b c", "a b", True), ("b", "a b c", True), ("a b c", "b", True), ("a c", "b", False), ("a b", "c d", False), ("a b", "b a b c", True), ("a b c", "b d", False)],
)  # fmt: skip
def test_runs_overlap_where_one_text_could_have_both_at_one_place(one: str, other: str, expected: bool) -> None:
    assert overlap(tuple(one.split()), tuple(other.split())) is expected


def test_words_of_a_template_are_left_out_where_no_other_text_has_the_rest() -> None:
    texts = [["you", "are", "kind", ".", "xyzzy", "now", "go"]] * 2
    others = [["you", "are", "kind", ".", f"n{i}", "go"] for i in range(10)]
    phrases = Phrases.of([*texts, *others])
    assert phrases.without_usual_ends(("are", "kind", ".", "xyzzy", "now", "go"), {0, 1}) == (".", "xyzzy", "now")
    assert phrases.without_usual_ends(("kind", "xyzzy"), {0, 1}) == ("xyzzy",)
    assert Phrases.of([*texts, *others, ["xyzzy"]]).without_usual_ends(("kind", "xyzzy"), {0, 1}) == ("kind", "xyzzy")
    assert phrases.without_usual_ends(("go",), {0, 1}) == ("go",)


def test_a_search_finds_whole_words_only() -> None:
    assert delimited(["b", "c"]) in delimited(["a", "b", "c"])
    assert delimited(["b"]) not in delimited(["ab", "bc"]) and delimited(["b"]) not in delimited([])
