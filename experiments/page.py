"""How every results page is laid out: a title, three sentences for a decision, the tables, and how they were measured."""

import re
import textwrap
from collections.abc import Sequence
from itertools import groupby

from molehunt.errors import UsageError

WIDTH = 118
"""Characters of a line of prose."""
TABLE_WIDTH = 158
"""Characters of a line of a table."""
WIDEST_NAME = 75
"""Characters of the columns that name a row, above which rows are numbered instead."""
CONTINUED = "The same rows, further columns:"
SENTENCES = 3
ENDS = re.compile(r"(?<=[.?!])\s+(?=[A-Z])")


def page(title: str, opening: Sequence[str], body: Sequence[str], how: str) -> str:
    """A whole page in Markdown.

    Args:
        title: the heading.
        opening: exactly three sentences that somebody understands who must decide something.
        body: the lines of the sections with the tables.
        how: paragraphs on how it was measured.

    Raises:
        UsageError: the opening has another number of sentences.
    """
    if len(opening) != SENTENCES:
        raise UsageError(f"the page {title!r} opens with {len(opening)} sentences; it must open with {SENTENCES}.")
    lines = [
        f"# {title}",
        "",
        *prose(" ".join(opening)),
        "",
        *wrapped(body),
        "",
        "## How it was measured",
        "",
        *prose(how),
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def wrapped(lines: Sequence[str]) -> list[str]:
    """The same lines with long prose broken and wide tables split; headings and fenced blocks stay as they are."""
    found: list[str] = []
    for is_table, group in groupby(lines, key=lambda line: line.startswith("|")):
        if is_table:
            found += narrow(list(group))
            continue
        for line in group:
            found += [line] if len(line) <= WIDTH or line.startswith(("#", "```")) else prose(line)
    return found


def narrow(table: Sequence[str]) -> list[str]:
    """A table in Markdown; one whose lines are longer than `TABLE_WIDTH` as several, which share what names a row.

    A row is named by its first columns, as many as no two rows share, or by its number where those would be too wide.

    Raises:
        UsageError: a cell is so long that no table can hold it.
    """
    if max(map(len, table)) <= TABLE_WIDTH:
        return list(table)
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    head, body = rows[0], rows[2:]
    named = next((n for n in range(1, len(head)) if len({tuple(row[:n]) for row in body}) == len(body)), len(head))
    if max(len(_line(row[:named])) for row in (head, *body)) > WIDEST_NAME:
        head, body = ["row", *head], [[str(number), *row] for number, row in enumerate(body, 1)]
        named = 1
    parts: list[list[int]] = [[]]
    for column in range(named, len(head)):
        wider = [*range(named), *parts[-1], column]
        if parts[-1] and max(len(_line([row[i] for i in wider])) for row in (head, *body)) > TABLE_WIDTH:
            parts.append([])
        parts[-1].append(column)
    tables = [grid(*_columns(head, body, [*range(named), *part])) for part in parts]
    longest = max(len(line) for one in tables for line in one)
    if longest > TABLE_WIDTH:
        raise UsageError(f"a row of a table has {longest} characters however it is split; shorten its cells.")
    found = list(tables[0])
    for one in tables[1:]:
        found += ["", CONTINUED, "", *one]
    return found


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _columns(
    head: Sequence[str], body: Sequence[Sequence[str]], chosen: Sequence[int]
) -> tuple[list[str], list[list[str]]]:
    return [head[i] for i in chosen], [[row[i] for i in chosen] for row in body]


def prose(text: str) -> list[str]:
    """Paragraphs and list items as lines of at most `WIDTH` characters."""
    found: list[str] = []
    for paragraph in text.strip().split("\n"):
        indent = re.match(r"\s*(- |\d+\. )?", paragraph)
        whole = re.sub(r"`[^`]+`", lambda span: span[0].replace(" ", "\0"), paragraph)  # code spans are not broken
        lines = textwrap.wrap(
            whole,
            WIDTH,
            subsequent_indent=" " * len(indent[0]) if indent else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        found += [line.replace("\0", " ") for line in lines] or [""]
    return found


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [_line(row) for row in (head, ["---"] * len(head), *rows)]


def counted(n: int, what: str) -> str:
    """`1 model`, `3 models`."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"
