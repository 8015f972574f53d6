"""Model text made visible: what a page or a terminal would swallow, reorder or obey is spelled out."""

import unicodedata

MARKS = {"\n": "␊", "\r": "␍", "\t": "␉", "\0": "␀", "\x1b": "␛"}
CUT = 1200
"""Characters of one text that a page shows."""


def visible(text: str, *, keep_lines: bool = False, limit: int = CUT) -> str:
    """`text` with control, format and bidirectional characters written out; a cut says how much is missing.

    Args:
        text: written by a model or a stranger.
        keep_lines: leave line breaks as they are (for blocks that show them).
        limit: characters kept.
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
