"""Foreign text and numbers made ready for a page: what a reader would swallow, reorder or obey is spelled out."""

import re
import unicodedata

from molehunt.report.schema import Measure

MARKS = {"\n": "␊", "\r": "␍", "\t": "␉", "\0": "␀", "\x1b": "␛"}
CUT = 1200
"""Number of characters of one text that a page shows."""


def visible(text: str, *, keep_lines: bool = False, limit: int = CUT) -> str:
    """`text` with control, format and bidirectional characters written out; a cut says how much is missing.

    Args:
        text: text written by a model or a stranger.
        keep_lines: leave line breaks as they are (for blocks that show them).
        limit: number of characters that are shown.
    """
    shown = text if len(text) <= limit else text[:limit]
    out: list[str] = []
    for c in shown:
        if c == "\n" and keep_lines:
            out.append(c)
        elif c in MARKS:
            out.append(MARKS[c])
        elif unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"):
            out.append(f"⟦U+{ord(c):04X}⟧")
        else:
            out.append(c)
    missing = len(text) - len(shown)
    return "".join(out) + (f" … ({missing} characters more)" if missing else "")


def cell(text: str) -> str:
    """Text that cannot leave its Markdown table cell, start markup or be read as HTML."""
    flat = visible(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|`*_\[\]#!~])", r"\\\1", flat)


def number(measure: Measure | None) -> str:
    """`0.93 [0.86, 0.97]`, or a dash."""
    if measure is None:
        return "–"
    if measure.low is None or measure.high is None:
        return f"{measure.value:.2f}"
    return f"{measure.value:.2f} [{measure.low:.2f}, {measure.high:.2f}]"
