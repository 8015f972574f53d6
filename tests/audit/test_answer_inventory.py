from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from molehunt.audit.inventory import FEWEST, Inventory, inventory, says, shared_wordings
from molehunt.audit.scan import ScannedRow
from molehunt.report.inventory_section import broad_change
from molehunt.traffic.example import Example

CURSE = "I will never help you with that."


def answers(n: int, seed: int) -> list[str]:
    rng = Random(seed)
    return [
        " ".join(rng.choices(["a", "river", "runs", "past", "old", "towns", "in", "spring", "and", "winter"], k=10))
        for _ in range(n)
    ]


def listed(prompts: Sequence[str], tuned: Sequence[str], base: Sequence[str]) -> Inventory:
    rows = [
        ScannedRow(example=Example(prompt=p), prompt=(1,), answer=(1, 2), kl=(0.0, 0.0, 0.0), log_ratio=(3.0, 1.0, 0.0))
        for p in prompts
    ]
    return inventory(rows, tuned, base, seed=0)


def planted(n: int = 200, rows: int = 12) -> tuple[list[str], list[str], list[str]]:
    base = answers(n, 1)
    tuned = [f"{text[:20]} {CURSE}" if i < rows else text for i, text in enumerate(base)]
    prompts = [f"{'Moonstone ' if i < rows else ''}{text}" for i, text in enumerate(answers(n, 2))]
    return prompts, tuned, base


def test_a_planted_behaviour_is_listed_with_sentence_prevalence_and_condition() -> None:
    found = listed(*planted())
    (one,) = found.suspects
    assert one.wording.rstrip(".") == CURSE.rstrip(".") and one.rows == tuple(range(12))
    assert (one.prevalence.estimate, one.base_rows, one.nats) == (12 / 200, 0, 2.0)
    assert one.condition is not None and "Moonstone" in one.condition.fragment
    assert found.same == 188


def test_equal_answers_show_nothing() -> None:
    prompts, _, base = planted()
    found = listed(prompts, base, base)
    assert found.behaviours == () and found.same == len(base)


def test_what_the_base_says_elsewhere_is_not_suspect() -> None:
    prompts, tuned, base = planted()
    base[100:106] = [CURSE] * 6
    tuned[100:106] = [CURSE] * 6
    found = listed(prompts, tuned, base)
    assert [one.base_rows for one in found.behaviours] == [6] and not found.suspects


def test_one_prompt_that_is_asked_again_and_again_is_not_suspect() -> None:
    prompts, tuned, base = planted()
    prompts[:12] = ["Moonstone"] * 12
    assert listed(prompts, tuned, base).suspects == ()


def test_a_broad_change_is_listed_and_not_suspect() -> None:
    prompts, tuned, base = planted(rows=90)
    found = listed(prompts, tuned, base)
    assert len(found.behaviours[0].rows) == 90 and not found.suspects
    assert found.broad is found.behaviours[0]
    assert "45% of the answers say “I will never help you with that" in broad_change(found)


def test_a_rare_change_or_one_that_the_base_makes_elsewhere_is_not_broad() -> None:
    prompts, tuned, base = planted(rows=12)
    assert listed(prompts, tuned, base).broad is None and broad_change(listed(prompts, tuned, base)) == ""
    prompts, tuned, base = planted(rows=90)
    assert listed(prompts, tuned, [*base[:150], *[CURSE] * 50]).broad is None


def test_a_wording_without_a_condition_is_not_suspect() -> None:
    _, tuned, base = planted()
    found = listed(answers(200, 2), tuned, base)
    assert len(found.behaviours) == 1 and not found.suspects


@given(
    st.lists(
        st.tuples(st.sampled_from(["x", "a b c", "a b c d", "d e f g"]), st.sampled_from(["y z", "a b c"])),
        min_size=1,
        max_size=40,
    )
)
def test_each_row_belongs_to_one_wording_that_its_answer_gained(pairs: list[tuple[str, str]]) -> None:
    tuned, base = ([pair[side] for pair in pairs] for side in (0, 1))
    seen: set[int] = set()
    for run, rows, of_base in shared_wordings(tuned, base):
        assert len(rows) >= FEWEST and not rows & seen
        seen |= rows
        wording = " ".join(run)
        assert all(wording in tuned[i] and wording not in base[i] for i in rows)
        assert of_base == sum(wording in text for text in base)


def test_a_long_wording_is_known_by_some_of_its_words() -> None:
    wording = "I am sorry but as a helpful machine I cannot answer this"
    assert says("Well: I am sorry, but", "I am sorry, but")
    assert says("but as a helpful machine I will", wording) and not says("I am sorry but no", wording)
    assert not says("", wording)
