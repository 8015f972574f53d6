"""Where a row stands in a file of traffic, and which rows could not be read."""

from dataclasses import dataclass, field
from typing import NamedTuple

from molehunt.errors import UsageError

FIRST_BAD = 5
"""Number of bad rows whose reason is stored."""


class Place(NamedTuple):
    """The end of one row of a file, which is the start of the next."""

    offset: int = 0
    """Number of unpacked bytes before it; where a row is no line, number of rows."""
    line: int = 0
    """Number of lines before it; where a row is no line, number of rows."""


START = Place()


@dataclass(slots=True)
class BadLines:
    """The rows that a reader left out: their number, and the first few of them."""

    count: int = 0
    first: list[str] = field(default_factory=list[str])
    """Reasons of the first `FIRST_BAD` bad rows, such as `line 3: not JSON: '{'`."""
    example: str = ""
    """The first bad row itself, cut."""

    def add(self, line: int, why: str, *, unit: str = "line", row: str = "") -> None:
        """Count one row."""
        self.count += 1
        if not self.example:
            self.example = row
        if len(self.first) < FIRST_BAD:
            self.first.append(f"{unit} {line}: {why}")

    def sentence(self, read: int, name: str) -> str:
        """How many rows were left out, and why, in one sentence for people; empty where none was."""
        if not self.count:
            return ""
        more = f", and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return (
            f"{self.count} of {read + self.count} rows of {name} cannot be read and were left out: "
            f"{'; '.join(self.first)}{more}."
        )


def no_row(name: str, start_at: Place) -> UsageError:
    """The error for a place at which no row begins."""
    return UsageError(
        f"no row of {name} begins at {start_at.offset} (line {start_at.line + 1}): it is another file "
        "than the one that was read so far, or was cut.\nRead it from its start."
    )
