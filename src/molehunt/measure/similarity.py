"""Similarity of texts without a model: chrF, and nearest neighbours over character trigrams."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

ORDER = 4


def chrf(a: str, b: str, *, order: int = ORDER) -> float:
    """Mean F1 over character n-grams of length 1..`order`: 1 for equal texts, 0 for texts without common n-grams. Symmetric.

    Source: Popović 2015 (chrF, with β = 1). N-grams longer than either text are left out of the mean.
    """
    if a == b:
        return 1.0
    scores: list[float] = []
    for n in range(1, order + 1):
        left, right = _ngrams(a, n), _ngrams(b, n)
        if not left or not right:
            break
        scores.append(2 * (left & right).total() / (left.total() + right.total()))
    return sum(scores) / len(scores) if scores else 0.0


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def nearest_texts(queries: Sequence[str], texts: Sequence[str], *, k: int) -> list[list[int]]:
    """For each query, the indices of the k most similar `texts` (or of all, if there are fewer), nearest first.

    Similarity is the cosine of character-trigram counts; ties keep the order of `texts`.
    """
    index: dict[str, int] = {}
    both = _trigrams([*queries, *texts], index)
    similarity = (both[: len(queries)] @ both[len(queries) :].T).toarray()
    return [np.argsort(-row, kind="stable")[:k].tolist() for row in similarity]


def _trigrams(texts: Sequence[str], index: dict[str, int]) -> csr_array:
    """Trigram counts of each text, as rows of norm 1."""
    data: list[float] = []
    columns: list[int] = []
    ends = [0]
    for text in texts:
        counts = _ngrams(text.ljust(3), 3)
        norm = sum(n * n for n in counts.values()) ** 0.5
        for gram, n in counts.items():
            columns.append(index.setdefault(gram, len(index)))
            data.append(n / norm)
        ends.append(len(data))
    return csr_array((np.array(data), np.array(columns, dtype=np.int64), ends), shape=(len(texts), len(index)))
