"""Runs of words that texts share, in any script and without a model."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

SIGNS = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
"""Characters of scripts that are written without spaces, as a range of a pattern."""
WORD = re.compile(rf"[{SIGNS}]|[^\W_{SIGNS}]+|[^\w\s]|_")
"""A word, a sign of a script that is written without spaces, or a punctuation mark."""
Run = tuple[str, ...]
"""Words that follow each other."""


def words(text: str) -> list[str]:
    """The words and punctuation marks of a text, without case."""
    return [match.group().casefold() for match in WORD.finditer(text)]


def as_written(run: Run, text: str) -> str:
    """The first place in `text` where a run of its `words` stands, with its case and spaces; empty if there is none."""
    found = list(WORD.finditer(text))
    folded = [match.group().casefold() for match in found]
    for at in range(len(folded) - len(run) + 1):
        if tuple(folded[at : at + len(run)]) == run:
            return text[found[at].start() : found[at + len(run) - 1].end()]
    return ""


def rows_of_runs(
    texts: Sequence[Sequence[str]], *, shortest: int, longest: int, fewest: int
) -> Mapping[Run, frozenset[int]]:
    """Which texts hold which runs.

    The runs are built word by word, and a run is only extended where it is frequent itself: memory follows what is shared,
    not what is written.

    Args:
        texts: the `words` of each text.
        shortest: least number of words of a run. A text with fewer words is one run as a whole.
        longest: greatest number of words of a run.
        fewest: number of texts that a run must stand in.

    Returns:
        A run → the numbers of the texts that hold it.
    """
    found: dict[Run, frozenset[int]] = {}
    starts = [range(max(1, len(text) - shortest + 1)) if text else () for text in texts]
    for n in range(shortest, longest + 1):
        seen: dict[Run, set[int]] = defaultdict(set)
        for number, text in enumerate(texts):
            for at in starts[number]:
                seen[tuple(text[at : at + n])].add(number)
        kept = {run: frozenset(rows) for run, rows in seen.items() if len(rows) >= fewest}
        found.update(kept)
        starts = [
            [at for at in starts[number] if at + n < len(text) and tuple(text[at : at + n]) in kept]
            for number, text in enumerate(texts)
        ]
    return found
