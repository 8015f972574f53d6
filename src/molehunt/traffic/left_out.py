"""What became of the rows of a file before a model read them: left out, cut, or longer than the model was trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from molehunt.errors import InvalidInput
from molehunt.traffic.example import Example
from molehunt.traffic.place import BadLines


@dataclass(frozen=True, slots=True)
class ReadRows:
    """The rows of traffic that can be read, and those that cannot."""

    rows: tuple[Example, ...]
    bad: BadLines = field(default_factory=BadLines)
    name: str = "the list"
    """What messages call the file."""

    @property
    def left_out(self) -> str:
        """How many rows were left out and why, as one sentence; empty where none was."""
        return self.bad.sentence(len(self.rows), self.name)


def askable(read: ReadRows, ask: Callable[[Example], object]) -> ReadRows:
    """The rows that a chat template accepts: some refuse a system message, or two turns of one side.

    Args:
        read: the rows of a file.
        ask: renders one row, and raises InvalidInput where the template refuses it.
    """
    bad = BadLines(read.bad.count, list(read.bad.first), read.bad.example)
    kept: list[Example] = []
    for number, row in enumerate(read.rows, 1):
        try:
            if row.turns:  # every template accepts one user turn, or the model cannot be asked at all
                ask(row)
        except InvalidInput as error:
            bad.add(number, str(error).replace("\n", " "), unit="row", row=row.shown[:200])
            continue
        kept.append(row)
    return read if len(kept) == len(read.rows) else ReadRows(tuple(kept), bad, read.name)


def keys_of(rows: Sequence[Example]) -> list[str | list[list[str]]]:
    """All that is asked in these rows, ready for JSON: what hashes of traffic are made of."""
    return [row.key for row in rows]
