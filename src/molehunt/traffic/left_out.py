"""What became of the rows of a file before a model read them: which were read, as what, and which were left out."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Literal

from molehunt.errors import InvalidInput
from molehunt.run.counting import counted
from molehunt.traffic.example import Example
from molehunt.traffic.place import BadLines
from molehunt.traffic.stream import Conversation

LoggedAnswers = Literal["not used", "judged"]
"""What a verb does with the answers that stand beside the prompts."""


@dataclass(slots=True)
class RowCount:
    """How many rows of traffic were read, in which forms, and which could not be read."""

    name: str = "the list"
    """What messages call the file."""
    rows: int = 0
    answered: int = 0
    """Number of the rows that have a logged answer."""
    forms: Counter[str] = field(default_factory=Counter[str])
    """Number of rows by their form, as `rows.form_of` names it."""
    bad: BadLines = field(default_factory=BadLines)
    limited: bool = False
    """Whether reading stopped at a greatest number of rows, so that more may follow."""

    def counting(self, rows: Iterable[Conversation]) -> Iterator[Conversation]:
        """The same rows, each counted as it is taken."""
        for row in rows:
            self.rows += 1
            self.answered += bool(row.response)
            self.forms[row.form] += bool(row.form)
            yield row

    def sentence(self, answers: LoggedAnswers, *, reasons: bool = True) -> str:
        """What was read, in one or two sentences for people; empty where there was no row.

        Args:
            answers: what becomes of logged answers.
            reasons: whether to say why rows cannot be read, which quotes them; otherwise they are named by number.
        """
        total = self.rows + self.bad.count
        if not total:
            return ""
        of = f"the first {counted(total, 'row')}" if self.limited else counted(total, "row")
        said = f"Read {self.rows:,} of {of} of {self.name}{_as(self.forms, self.rows)}"
        logged = ""
        if self.answered:
            logged = f"logged answers are {answers}"
            if self.answered < self.rows:
                verb = "is" if self.answered == 1 else "are"
                logged = f"the {counted(self.answered, 'logged answer')} {verb} {answers}"
        if not self.bad.count:
            return f"{said}; {logged}." if logged else f"{said}."
        refused = f"{said}; {self.bad.count} could not be read: {self.bad.reasons if reasons else self.bad.places}."
        return f"{refused} {logged[0].upper()}{logged[1:]}." if logged else refused


@dataclass(frozen=True, slots=True)
class ReadRows:
    """The rows of traffic that can be read, and those that cannot."""

    rows: tuple[Example, ...]
    bad: BadLines = field(default_factory=BadLines)
    name: str = "the list"
    """What messages call the file."""
    forms: Mapping[str, int] = field(default_factory=dict[str, int])
    """Number of rows by their form, as `rows.form_of` names it."""
    limited: bool = False
    """Whether reading stopped at a greatest number of rows, so that more may follow."""

    @property
    def note(self) -> str:
        """What was read, as what, and what was left out and why, for verbs that do not use logged answers."""
        answered = sum(bool(row.response) for row in self.rows)
        count = RowCount(self.name, len(self.rows), answered, Counter(self.forms), self.bad, self.limited)
        return count.sentence("not used")

    @property
    def left_out(self) -> str:
        """The same where rows were left out; empty where none was."""
        return self.note if self.bad.count else ""


def askable(read: ReadRows, ask: Callable[[Example], object]) -> ReadRows:
    """The rows that a chat template accepts: some refuse a system message, or two turns of one side.

    Args:
        read: the rows of a file.
        ask: renders one row, and raises InvalidInput where the template refuses it.
    """
    bad = deepcopy(read.bad)
    kept: list[Example] = []
    for number, row in enumerate(read.rows, 1):
        try:
            if row.turns:  # every template accepts one user turn, or the model cannot be asked at all
                ask(row)
        except InvalidInput as error:
            where = (number, "row") if row.line is None else (row.line, "line")
            bad.add(where[0], str(error).replace("\n", " "), unit=where[1], row=row.shown[:200])
            continue
        kept.append(row)
    return read if len(kept) == len(read.rows) else replace(read, rows=tuple(kept), bad=bad)


def keys_of(rows: Sequence[Example]) -> list[str | list[list[str]]]:
    """All that is asked in these rows, ready for JSON: what hashes of traffic are made of."""
    return [row.key for row in rows]


def _as(forms: Mapping[str, int], rows: int) -> str:
    """The forms of the rows, most common first, as the end of a sentence."""
    known = sorted(((n, form) for form, n in forms.items() if form and n), key=lambda one: (-one[0], one[1]))
    if len(known) == 1 and known[0][0] >= rows:
        return f", {known[0][1]}"
    return f", {', '.join(f'{n} {form}' for n, form in known)}" if known else ""
