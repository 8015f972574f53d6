"""Where a row stands in a file of traffic, and which rows could not be read."""

from dataclasses import dataclass, field
from typing import NamedTuple

from molehunt.errors import UsageError
from molehunt.run.counting import counted

FIRST_BAD = 5
"""Number of bad rows whose reason is stored."""
RANGES = 8
"""Number of ranges of further bad rows whose numbers are stored."""


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
    unit: str = "line"
    """What the latest bad row is called."""
    later: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Numbers of the bad rows behind those in `first`, as ranges with both ends; at most `RANGES`."""

    def add(self, line: int, why: str, *, unit: str = "line", row: str = "") -> None:
        """Count one row."""
        self.count += 1
        self.unit = unit
        if not self.example:
            self.example = row
        if len(self.first) < FIRST_BAD:
            self.first.append(f"{unit} {line}: {why}")
        elif self.later and self.later[-1][1] == line - 1:
            self.later[-1] = (self.later[-1][0], line)
        elif len(self.later) < RANGES:
            self.later.append((line, line))

    @property
    def more(self) -> str:
        """The bad rows behind those in `first`, such as `and 41 more rows: lines 30, 61–100`; empty where there are none."""
        n = self.count - len(self.first)
        if n <= 0:
            return ""
        shown = ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in self.later)
        cut = ", …" if sum(last - first + 1 for first, last in self.later) < n else ""
        return f"and {counted(n, 'more row')}: {self.unit if n == 1 else f'{self.unit}s'} {shown}{cut}"

    @property
    def reasons(self) -> str:
        """Why the first bad rows cannot be read, and which others there are; empty where there are none."""
        return "; ".join([*self.first, *([self.more] if self.more else [])])

    @property
    def places(self) -> str:
        """As `reasons`, without a word of what the rows say."""
        return "; ".join([*(one.partition(":")[0] for one in self.first), *([self.more] if self.more else [])])


def no_row(name: str, start_at: Place) -> UsageError:
    """The error for a place at which no row begins."""
    return UsageError(
        f"no row of {name} begins at {start_at.offset} (line {start_at.line + 1}): it is another file "
        "than the one that was read so far, or was cut.\nRead it from its start."
    )
