"""How every results page is laid out: a title, three sentences for a decision, the tables, and how they were measured."""

import re
import textwrap
from collections.abc import Sequence

from molehunt.errors import UsageError

WIDTH = 118
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
    """The same lines with long prose broken; tables, headings and fenced blocks stay as they are."""
    found: list[str] = []
    for line in lines:
        found += [line] if len(line) <= WIDTH or line.startswith(("|", "#", "```")) else prose(line)
    return found


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
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def counted(n: int, what: str) -> str:
    """`1 model`, `3 models`."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"
