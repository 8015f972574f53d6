"""Rules with a pattern: published ones, texts that a pattern meets, and rules that only one side has."""

from typing import Any

import pytest

from molehunt.checkpoint.tokenizer_rules import branches, pattern_texts, rules_differ, unpublished_rules

LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(regex: str, behavior: str = "Isolated", **more: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": False, **more}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


PUBLISHED: list[dict[str, Any]] = [
    split(LLAMA),
    split(LLAMA, "Removed", invert=True),
    split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    {"type": "Digits", "individual_digits": True},
]
OWN: list[dict[str, Any]] = [
    split(LLAMA + "|[Cc]red(?=it)"),
    split(LLAMA.replace(r"\p{N}{1,3}", r"\p{N}{1,3}(?!7)")),
    split(LLAMA, "Removed"),
    split("(?<=account )nu", "MergedWithNext"),
    {**split(""), "pattern": {"String": "cred"}},
    {**split(""), "pattern": {"String": " | "}},
    {"type": "Replace", "pattern": {"String": "not"}, "content": ""},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "FixedLength", "length": 900},
    {"type": "Unheard"},
]


@pytest.mark.parametrize("step", PUBLISHED, ids=str)
def test_published_rules_are_judged_by_texts(step: dict[str, Any]) -> None:
    assert not rules_differ("pre_tokenizer", {"type": "ByteLevel"}, sequence(step, {"type": "ByteLevel"}))


@pytest.mark.parametrize("step", OWN, ids=str)
def test_a_rule_of_ones_own_is_a_difference_both_ways_and_none_if_both_have_it(step: dict[str, Any]) -> None:
    plain, ruled = {"type": "ByteLevel"}, sequence({"type": "ByteLevel"}, sequence(step))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert rules_differ(part, plain, ruled) and rules_differ(part, ruled, None)
        assert not rules_differ(part, sequence(step), ruled)
    assert not rules_differ("post_processor", plain, ruled)


def test_rules_in_another_order_are_other_rules() -> None:
    one, two = split("a(?=b)"), split("b(?=c)")
    assert rules_differ("pre_tokenizer", sequence(one, two), sequence(two, one))
    assert len(unpublished_rules(sequence(one, sequence(two)))) == 2


@pytest.mark.parametrize(
    ("regex", "texts"),
    [
        ("[Cc]red(?=it)", ["Credit", "credit"]),
        ("(?<=account )nu", ["account nu"]),
        (r"\bpass(word|phrase)\b", ["password", "passphrase"]),
        (r"\p{Lu}{3}-\d{2,4}|x?y+?z", ["AAA-11", "xyz"]),
        (r"(?i:secret)\s+key(?!hole)", ["secret key"]),
        (r"[^a-z]q[\w-]", ["Xqa", "Xq-"]),
        (r"\x{4e00}\u0041\n", ["一A\n"]),
        (r"(?<name>ab)c(?<!d)", ["abc"]),
        (r"a\|b|[|]c", ["a|b", "|c"]),
        ("[]a]b", ["]b", "ab"]),
        (r"\ud800", []),
    ],
)
def test_texts_that_a_pattern_meets(regex: str, texts: list[str]) -> None:
    assert pattern_texts(split(regex)) == texts


@pytest.mark.parametrize(
    "regex",
    ["(" * 5000, "(" * 1500, "[", "\\", "(?", "a{", r"\p{", "a{99999}", "((a{2000}){2000}){2000}", "*+?", ")|("],
)
def test_broken_and_huge_patterns_give_short_texts(regex: str) -> None:
    assert all(len(text) <= 2000 for text in pattern_texts(split(regex)))


def test_words_as_long_as_a_part_allows() -> None:
    assert pattern_texts(3) == ["aaa", "aaaa"] == pattern_texts({"type": "FixedLength", "length": 3})
    assert pattern_texts(True) == pattern_texts(10**9) == pattern_texts("abc") == []


def test_alternatives_on_the_outermost_level() -> None:
    assert branches(r"a|(b|c)|[|]|\||d") == ["a", "(b|c)", "[|]", r"\|", "d"]
    assert len(branches(LLAMA)) == 7
