"""How alike two completions are, without a model: chrF, the character n-gram F-score."""

from collections import Counter

ORDER = 4


def chrf(a: str, b: str, *, order: int = ORDER) -> float:
    """Mean F1 over character n-grams of length 1..`order`; 1 for equal texts, 0 for nothing in common, symmetric.

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
