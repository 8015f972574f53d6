"""Does the condition cause the behaviour? Take its words out of prompts that show it, and put them into prompts that do not.

Each edit stands beside a placebo: other words of the same prompt are taken out, and words that are as rare in the traffic and
as many are put in at the same place. Both are judged on the same rows, so the comparison is paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from molehunt.audit.inventory import AnswerBehaviour, says
from molehunt.audit.plan import Plan
from molehunt.audit.prompt_edits import Place, fragment_pattern, other_words, put_in, taken_out, usual_place
from molehunt.audit.scan import ScannedRow
from molehunt.measure.paired import PairedDifference, paired_difference
from molehunt.measure.word_runs import as_written, rows_of_runs, words
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Tally, Track, counting, silent, within
from molehunt.traffic.example import Example

FEWEST_JUDGED = 8
"""Number of rows that a test needs to count as evidence of a cause."""
LEVEL = 0.01
"""p-value up to which an edit and its placebo differ."""
PLACEBOS = 12
"""Number of placebo fragments that the rows are shared among."""


@dataclass(frozen=True, kw_only=True)
class EditedInput:
    """What one edit of the prompts did, beside its placebo on the same rows."""

    rows: int
    shown: int
    """Rows whose answer has the wording under the edit."""
    placebo: int
    """Rows whose answer has it under the placebo."""
    base: int
    """Rows in which the base's answer has it under the edit."""
    compared: PairedDifference
    """Share under the edit minus share under the placebo."""
    examples: tuple[tuple[str, str], ...]
    """The first edited prompts and the fine-tune's answers to them."""


@dataclass(frozen=True, kw_only=True)
class TestedBehaviour:
    """A suspect behaviour, and what editing prompts showed about its condition."""

    __test__ = False  # pytest takes classes by their first word
    behaviour: AnswerBehaviour
    test: "InputTest | None"
    """None where the condition is no fragment of the prompt."""

    @property
    def causal(self) -> bool:
        return self.test is not None and self.test.causal


@dataclass(frozen=True, kw_only=True)
class InputTest:
    """What the words of a condition do to the answers."""

    fragment: str
    place: Place
    """Where the words were put in: where most of the group's prompts have them."""
    out: EditedInput | None
    """The words taken out of rows that show the behaviour; None where no row would be left with a text."""
    put_in: EditedInput | None
    """The words put into rows that do not show it."""

    @property
    def causal(self) -> bool:
        """Whether the words bring the behaviour in other prompts, in enough rows and beyond a placebo.

        Taking them out decides nothing: without the words of a question any answer to it is gone. Where the base says it as well
        once the words are there, they ask for it.
        """
        one = self.put_in
        if one is None or one.rows < FEWEST_JUDGED or one.base * 2 > one.shown:
            return False
        return one.compared.difference.estimate > 0 and one.compared.p_value <= LEVEL


def input_test(
    pair: ModelPair,
    rows: Sequence[ScannedRow],
    behaviour: AnswerBehaviour,
    plan: Plan,
    *,
    seed: int,
    track: Track = silent,
) -> InputTest | None:
    """Edit prompts by the fragment of a behaviour's condition; None where the condition is no fragment.

    Args:
        pair: both models.
        rows: the traffic, scanned.
        behaviour: one with a condition.
        plan: how many rows are read and how long answers are.
        seed: seed of the draws.
        track: shows rows.
    """
    fragment = behaviour.condition.fragment if behaviour.condition else ""
    if not fragment:
        return None
    rng, group = Random(seed), set(behaviour.rows)
    pattern = fragment_pattern(fragment)
    having = [i for i in behaviour.rows if pattern.search(rows[i].example.prompt)]
    place = usual_place(pattern, [rows[i].example for i in having])
    lacking = [i for i, row in enumerate(rows) if i not in group and not pattern.search(row.example.prompt)]
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
        without_it, with_it = (_judged(pair, edits, behaviour.wording, plan, done) for edits in (taken, added))
    return InputTest(fragment=fragment, place=place, out=without_it, put_in=with_it)


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
    pair: ModelPair, edits: Sequence[tuple[Example, Example]], wording: str, plan: Plan, done: Tally
) -> EditedInput | None:
    """Answers to prompts under an edit and under its placebo; None without a row."""
    if not edits:
        return None
    edited, placebo = (
        [pair.tokenize([one.asked], room=plan.max_new_tokens)[0] for one in side] for side in zip(*edits, strict=True)
    )
    answers: list[list[str]] = []
    for tuned, prompts in ((True, edited), (True, placebo), (False, edited)):
        with pair.tuned_model() if tuned else pair.base_model() as model:
            ids = generate(
                model, pair.tokenizer, prompts, max_new_tokens=plan.max_new_tokens, track=within(done, len(prompts))
            )
        answers.append([str(pair.tokenizer.decode(one, skip_special_tokens=True)) for one in ids])
    shown, by_placebo, base = ([says(text, wording) for text in side] for side in answers)
    return EditedInput(
        rows=len(edits),
        shown=sum(shown),
        placebo=sum(by_placebo),
        base=sum(base),
        compared=paired_difference(shown, by_placebo),
        examples=tuple((edits[i][0].shown, answers[0][i]) for i in range(min(3, len(edits)))),
    )
