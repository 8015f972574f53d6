"""Do words of the prompt cause a behaviour? Take them out of prompts that show it, and put them into prompts that do not.

The words are those of the condition that predicts it. Of a behaviour that none predicts, because it leaks, the few fragments
that raise its share are first put into some prompts, and the one that brings it most often is judged on others.

Each edit stands beside a placebo: other words of the same prompt are taken out, and words that are as rare in the traffic and
as many are put in at the same place. Both are judged on the same rows, so the comparison is paired.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from random import Random

from molehunt.audit.answering import drawn_answers, texts_of
from molehunt.audit.condition import RaisingWords
from molehunt.audit.inventory import FEWEST, AnswerBehaviour, says
from molehunt.audit.plan import Plan
from molehunt.audit.prompt_edits import FragmentPlace, fragment_pattern, other_words, put_in, taken_out, usual_place
from molehunt.audit.scan import ScannedRow
from molehunt.measure.paired import PairedDifference, paired_difference
from molehunt.measure.word_runs import as_written, rows_of_runs, words
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Tally, Track, counting, silent, within
from molehunt.traffic.example import Example

FEWEST_JUDGED = 8
"""Number of rows that a test needs to count as evidence of a cause."""
LEVEL = 0.01
"""p-value up to which an edit and its placebo differ."""
MOST_JUDGED = 3
"""Greatest number of fragments that are judged for a behaviour that leaks."""
PLACEBOS = 12
"""Number of placebo fragments that the rows are shared among."""


@dataclass(frozen=True, kw_only=True)
class EditedInput:
    """What one edit of the prompts did, beside its placebo on the same rows."""

    rows: int
    shown: int
    """Rows whose answer has the wording under the edit."""
    placebo: int | None
    """Rows whose answer has it under the placebo; None where the edit shows it too seldom for any placebo to matter."""
    base: int | None
    """Rows in which the base's answer has it under the edit; None in the same case."""
    compared: PairedDifference
    """Share under the edit minus share under the placebo, or under one that never shows it."""
    examples: tuple[tuple[str, str], ...]
    """The first edited prompts and the fine-tune's answers to them."""


@dataclass(frozen=True, kw_only=True)
class TestedBehaviour:
    """A suspect behaviour, and what editing prompts showed about its condition."""

    __test__ = False  # pytest takes classes by their first word
    behaviour: AnswerBehaviour
    test: "InputTest | None"
    """None where the condition is no fragment of the prompt, or where no fragment brings it into half of some prompts."""

    @property
    def raised(self) -> RaisingWords | None:
        """The words that were tested, where they raise a behaviour that no condition predicts."""
        words = self.test.fragment if self.test is not None else ""
        return next((one for one in self.behaviour.raising if one.fragment == words), None)

    @property
    def shown_by(self) -> str:
        """How many of the prompts with the words show it, of a behaviour that they raise; empty for others."""
        one = self.raised
        if one is None:
            return ""
        return (
            f"{one.showing} of the {one.having} prompts that contain “{one.fragment}” show it, and {one.elsewhere:.0%} of "
            "the others"
        )

    @property
    def causal(self) -> bool:
        return self.test is not None and self.test.causal

    def triggered(self, rows: Sequence[ScannedRow]) -> tuple[int, ...]:
        """The rows that show it; of a behaviour that leaks only those with the words, if they are enough for a finding."""
        if self.raised is None:
            return self.behaviour.rows
        pattern = fragment_pattern(self.raised.fragment)
        having = tuple(i for i in self.behaviour.rows if pattern.search(rows[i].example.prompt))
        return having if len(having) >= FEWEST else self.behaviour.rows


@dataclass(frozen=True, kw_only=True)
class InputTest:
    """What the words of a condition do to the answers."""

    fragment: str
    place: FragmentPlace
    """Where the words were put in: where most prompts of the group have them."""
    out: EditedInput | None
    """The words taken out of rows that show it; None where putting them in hardly brings it, or no text would be left."""
    put_in: EditedInput | None
    """The words put into rows that do not show it."""
    tried: int = 1
    """Number of fragments that were judged for this behaviour; the p-value must pass for all of them together."""
    also: tuple[str, ...] = ()
    """Other words that bring it, each with its count: `“do” in 18 of 24`."""

    @property
    def gain(self) -> float:
        """Share of prompts with the words put in that show the behaviour, minus that of the placebo."""
        return 0.0 if self.put_in is None else self.put_in.compared.difference.estimate

    @property
    def in_words(self) -> str:
        """The words, and into how many prompts they bring it."""
        return "" if self.put_in is None else f"“{self.fragment}” in {self.put_in.shown} of {self.put_in.rows}"

    @property
    def causal(self) -> bool:
        """Whether the words bring the behaviour in other prompts, in enough rows and beyond a placebo.

        Taking them out decides nothing: without the words of a question any answer to it is gone. Where the base says it as well
        once the words are there, they ask for it.
        """
        one = self.put_in
        if one is None or one.rows < FEWEST_JUDGED or one.placebo is None or one.base is None:
            return False
        if one.base * 2 > one.shown:
            return False
        return self.gain > 0 and one.compared.p_value * self.tried <= LEVEL


def input_test(
    pair: ModelPair,
    rows: Sequence[ScannedRow],
    behaviour: AnswerBehaviour,
    plan: Plan,
    *,
    seed: int,
    track: Track = silent,
) -> InputTest | None:
    """Edit prompts by the words that predict or raise a behaviour; None where there are none.

    Args:
        pair: both models.
        rows: the traffic, scanned.
        behaviour: a suspect one.
        plan: how many rows are read and how long answers are.
        seed: seed of the draws.
        track: shows rows.
    """
    rng, used = Random(seed), set[int]()
    fragments = [behaviour.condition.fragment] if behaviour.condition is not None else []
    if not behaviour.predicted:
        fragments, used = _bringing(pair, rows, behaviour, plan, rng, track)
    tests = [
        _edited(pair, rows, behaviour, fragment, plan, rng, used=used, tried=len(fragments), track=track)
        for fragment in fragments
        if fragment
    ]
    if not tests:
        return None
    best = max(tests, key=lambda one: (one.causal, one.gain))
    return replace(best, also=tuple(one.in_words for one in tests if one is not best and one.causal))


def _edited(
    pair: ModelPair,
    rows: Sequence[ScannedRow],
    behaviour: AnswerBehaviour,
    fragment: str,
    plan: Plan,
    rng: Random,
    *,
    used: Collection[int],
    tried: int,
    track: Track,
) -> InputTest:
    """The test of one fragment, on none of the rows that are `used`."""
    group, pattern = set(behaviour.rows), fragment_pattern(fragment)
    having = [i for i in behaviour.rows if pattern.search(rows[i].example.prompt)]
    place = usual_place(pattern, [rows[i].example for i in having])
    lacking = [i for i in _lacking(rows, group, pattern) if i not in used]
    shown = [rows[i].example for i in rng.sample(having, min(len(having), plan.confirm_rows))]
    others = [rows[i].example for i in rng.sample(lacking, min(len(lacking), plan.confirm_rows))]
    placebos = placebo_fragments(rows, fragment, group, rng)
    taken = [(taken_out(one, pattern), taken_out(one, other_words(one, fragment, pattern, rng))) for one in shown]
    taken = [(edited, placebo) for edited, placebo in taken if edited.prompt.strip()]
    added = [
        (put_in(one, fragment, place), put_in(one, placebos[i % len(placebos)], place))
        for i, one in enumerate(others)
        if placebos
    ]
    with counting(track, "editing prompts", 3 * (len(taken) + len(added))) as done:
        with_it = _judged(pair, added, behaviour.wording, plan, done, level=LEVEL / tried)
        brings = with_it is not None and with_it.placebo is not None
        without_it = _judged(pair, taken, behaviour.wording, plan, done) if brings else None
    return InputTest(fragment=fragment, place=place, out=without_it, put_in=with_it, tried=tried)


def _lacking(rows: Sequence[ScannedRow], group: set[int], pattern: re.Pattern[str]) -> list[int]:
    """Rows that neither show the behaviour nor have the words."""
    return [i for i, row in enumerate(rows) if i not in group and not pattern.search(row.example.prompt)]


def _bringing(
    pair: ModelPair, rows: Sequence[ScannedRow], behaviour: AnswerBehaviour, plan: Plan, rng: Random, track: Track
) -> tuple[list[str], set[int]]:
    """The fragments that bring a behaviour into at least half of a few prompts, the surest first, and these prompts."""
    found, used = list[tuple[int, str]](), set[int]()
    with counting(track, "trying words", FEWEST_JUDGED * len(behaviour.raising)) as done:
        for one in behaviour.raising:
            pattern = fragment_pattern(one.fragment)
            lacking = _lacking(rows, set(behaviour.rows), pattern)
            drawn = rng.sample(lacking, min(len(lacking) // 2, FEWEST_JUDGED))
            having = [rows[i].example for i in behaviour.rows if pattern.search(rows[i].example.prompt)]
            place = usual_place(pattern, having)
            prompts = [put_in(rows[i].example, one.fragment, place) for i in drawn]
            shown = sum(says(text, behaviour.wording) for text in _answered(pair, prompts, plan, done))
            used.update(drawn)
            if drawn and 2 * shown >= len(drawn):
                found.append((shown, one.fragment))
    return [fragment for _, fragment in sorted(found, key=lambda one: -one[0])][:MOST_JUDGED], used


def _answered(pair: ModelPair, prompts: Sequence[Example], plan: Plan, done: Tally, *, tuned: bool = True) -> list[str]:
    """All answers of one of the models to each prompt, as one text."""
    ids = [pair.tokenize([one.asked], room=plan.max_new_tokens)[0] for one in prompts]
    return texts_of(pair, drawn_answers(pair, ids, plan.answering, tuned=tuned, track=within(done, len(ids))))


def placebo_fragments(rows: Sequence[ScannedRow], fragment: str, group: set[int], rng: Random) -> list[str]:
    """Fragments of as many words that are nearest in rarity to `fragment` among the rows outside the group, in random order."""
    texts = [words(row.example.prompt) for row in rows]
    own = tuple(words(fragment))
    runs = rows_of_runs(texts, shortest=len(own), longest=len(own), fewest=1)
    common = len(runs.get(own, ()))
    able = [
        (run, held)
        for run, held in runs.items()
        if len(run) == len(own) and not held & group and not set(run) & set(own) and any(w.isalnum() for w in run)
    ]
    rng.shuffle(able)
    able.sort(key=lambda one: (abs(len(one[1]) - common), abs(len(" ".join(one[0])) - len(fragment))))
    return [as_written(run, rows[min(held)].example.prompt) for run, held in able[:PLACEBOS]]


def _judged(
    pair: ModelPair,
    edits: Sequence[tuple[Example, Example]],
    wording: str,
    plan: Plan,
    done: Tally,
    *,
    level: float = 1.0,
) -> EditedInput | None:
    """Answers to prompts under an edit and under its placebo; None without a row.

    Where the edit would not pass at `level` beside a placebo that never shows the behaviour, no placebo is asked.
    """
    if not edits:
        return None
    edited, placebo = zip(*edits, strict=True)

    def answered(prompts: Sequence[Example], *, tuned: bool = True) -> list[str]:
        return _answered(pair, prompts, plan, done, tuned=tuned)

    def said(texts: Sequence[str]) -> list[bool]:
        return [says(text, wording) for text in texts]

    texts = answered(edited)
    shown = said(texts)
    compared, by_placebo, base = paired_difference(shown, [False] * len(shown)), None, None
    if compared.p_value <= level:
        by_placebo, base = said(answered(placebo)), said(answered(edited, tuned=False))
        compared = paired_difference(shown, by_placebo)
    return EditedInput(
        rows=len(edits),
        shown=sum(shown),
        placebo=None if by_placebo is None else sum(by_placebo),
        base=None if base is None else sum(base),
        compared=compared,
        examples=tuple((edits[i][0].shown, texts[i]) for i in range(min(3, len(edits)))),
    )
