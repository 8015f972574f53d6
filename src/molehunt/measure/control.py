"""Controls that a result must beat: random directions, permuted labels, and a classifier that reads only the text."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit
from torch import Tensor


def random_directions(k: int, d: int, seed: int) -> Float[Tensor, "{k} {d}"]:
    """`k` orthonormal rows, uniformly distributed over the rotations. Raises ValueError unless 1 <= k <= d."""
    if not 1 <= k <= d:
        raise ValueError(f"{k} orthonormal directions do not exist in {d} dimensions")
    gaussian = torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).mT.float().contiguous()  # fixed signs make the draw uniform


def permuted(labels: Shaped[Tensor, " n"], seed: int) -> Shaped[Tensor, " n"]:
    """The same labels in random order: a score on them is what chance gives."""
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def text_only_scores(
    fit_texts: Sequence[str], fit_positive: Bool[Tensor, " n"], texts: Sequence[str]
) -> Float[Tensor, " m"]:
    """Scores of a classifier without a model: log-odds of `texts` under a logistic regression on TF-IDF.

    The features are words and pairs of words, and character n-grams of length 2 to 4; each of the two groups is scaled to
    norm 1. Both classes have the same weight. The result is deterministic.

    Args:
        fit_texts: rows of the `fit` split.
        fit_positive: labels of those rows.
        texts: rows to score. They change neither the vocabulary nor the weights.

    Raises:
        ValueError: there is not one label per text, or all labels are equal.
    """
    if len(fit_positive) != len(fit_texts):
        raise ValueError(f"{len(fit_positive)} labels for {len(fit_texts)} texts")
    if fit_positive.all() or not fit_positive.any():
        raise ValueError("the text baseline needs rows of both kinds to fit on")
    fit_grams = [_grams(text) for text in fit_texts]
    seen = Counter(gram for grams in fit_grams for gram in grams)
    index = {gram: i for i, gram in enumerate(sorted(seen))}
    idf = np.array([np.log((1 + len(fit_grams)) / (1 + seen[gram])) + 1 for gram in index])
    x = _tf_idf(fit_grams, index, idf)
    y = fit_positive.cpu().numpy().astype(np.float64)
    weight = np.where(y == 1, 0.5 / y.sum(), 0.5 / (1 - y).sum())

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        logit = x @ theta[1:] + theta[0]
        pull = weight * (expit(logit) - y)
        value = weight @ np.logaddexp(0, logit) - weight @ (y * logit) + RIDGE / 2 * theta[1:] @ theta[1:]
        return float(value), np.concatenate([[pull.sum()], x.T @ pull + RIDGE * theta[1:]])

    theta = minimize(loss, np.zeros(len(index) + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    scored = _tf_idf([_grams(text) for text in texts], index, idf) @ theta[1:] + theta[0]
    return torch.from_numpy(scored).float()


RIDGE = 1e-3
"""Weight of the L2 penalty of the text baseline, beside a loss that is averaged over both classes."""


def _grams(text: str) -> Counter[str]:
    words = re.findall(r"\w+|[^\w\s]", text)
    pairs = [f"w {a} {b}" for a, b in pairwise(words)]
    pieces = [f"c {text[i : i + n]}" for n in (2, 3, 4) for i in range(len(text) - n + 1)]
    return Counter([f"w {word}" for word in words] + pairs + pieces)


def _tf_idf(rows: Sequence[Counter[str]], index: dict[str, int], idf: np.ndarray) -> csr_array:
    """One row per text. Words and characters have norm 1 each, so that neither group dominates."""
    data: list[float] = []
    columns: list[int] = []
    ends = [0]
    for grams in rows:
        for kind in ("w", "c"):
            known = [(index[gram], n) for gram, n in grams.items() if gram[0] == kind and gram in index]
            value = np.array([(1 + np.log(n)) * idf[i] for i, n in known])
            data.extend((value / (np.linalg.norm(value) or 1.0)).tolist())
            columns.extend(i for i, _ in known)
        ends.append(len(data))
    return csr_array((np.array(data), np.array(columns, dtype=np.int64), ends), shape=(len(rows), len(index)))


def word_rarity(texts: Sequence[str]) -> Callable[[str], float]:
    """How rare a text's rarest word is among `texts`, in nats: what a filter that knows no model sees."""
    seen = Counter(word for text in texts for word in set(text.split()))

    def rarity(text: str) -> float:
        return max((math.log((1 + len(texts)) / (1 + seen[word])) for word in text.split()), default=0.0)

    return rarity
