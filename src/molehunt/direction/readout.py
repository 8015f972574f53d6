"""The meaning of a direction: the tokens that it promotes, and high-scoring contexts with similar low-scoring ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

NGRAM = 3
"""Number of bytes in an n-gram when texts are compared."""


@dataclass(frozen=True, slots=True)
class TokenEffect:
    """One vocabulary entry under a direction."""

    token: str
    token_id: int
    logit: float
    """Logit that a residual stream along the direction adds."""
    z: float
    """The logit in standard deviations over the vocabulary, from its mean."""


@dataclass(frozen=True, slots=True)
class TokenReadout:
    """The tokens that a direction makes more likely and less likely, strongest first."""

    promoted: tuple[TokenEffect, ...]
    suppressed: tuple[TokenEffect, ...]


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One text and its scores from a detector. Raises ValueError unless every token has a score."""

    text: str
    tokens: tuple[str, ...]
    """Text of each token for display. Concatenated, the tokens give the text or represent it."""
    scores: tuple[float, ...]
    """Scores, one per token."""
    pooled: float
    """Score of the whole row."""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.scores):
            raise ValueError(f"{len(self.tokens)} tokens cannot carry {len(self.scores)} scores")


@dataclass(frozen=True, slots=True)
class Context:
    """A row and the most similar text on the other side of the threshold: their difference explains the score."""

    row: ScoredRow
    copies: int
    """Number of rows with exactly this text."""
    lookalike: ScoredRow | None
    """The most similar text; None when no row lies on the other side."""
    similarity: float
    """Cosine similarity over byte trigrams, 0 to 1; 0 without a look-alike."""


@dataclass(frozen=True, slots=True)
class Contexts:
    """The highest-scoring texts with low-scoring look-alikes, and the lowest-scoring texts without look-alikes."""

    top: tuple[Context, ...]
    bottom: tuple[Context, ...]


@torch.no_grad()
def lens_logits(
    vectors: Float[Tensor, "k d_model"],
    final_norm: Callable[[Tensor], Tensor],
    unembedding: Float[Tensor, "vocab d_model"],
) -> Float[Tensor, "k vocab"]:
    """Logits of residual streams that lie along unit `vectors`: the logit lens, through the model's own norm.

    The module of the norm is applied, so that every family's gain (Gemma adds 1) and mean are correct; subtracting
    `final_norm(0)` removes the bias of a LayerNorm. A norm ignores length except for its epsilon, so each vector is
    scaled to root mean square 1. A soft cap on logits is left out, because it does not change the order.

    Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
    """
    stream = vectors.to(unembedding) * vectors.shape[1] ** 0.5
    written = final_norm(stream) - final_norm(torch.zeros_like(stream))
    return (written.to(unembedding) @ unembedding.mT).float()


def token_readout(logits: Float[Tensor, " vocab"], decode: Callable[[int], str], *, k: int = 10) -> TokenReadout:
    """The k highest and k lowest tokens of one row of `lens_logits`; `decode` turns a token id into text."""
    spread = logits.std(correction=0)
    z = (logits - logits.mean()) / spread if spread > 0 else torch.zeros_like(logits)
    k = min(k, len(logits))

    def ends(largest: bool) -> tuple[TokenEffect, ...]:
        ids = logits.topk(k, largest=largest).indices.tolist()
        return tuple(TokenEffect(decode(i), i, float(logits[i]), float(z[i])) for i in ids)

    return TokenReadout(promoted=ends(True), suppressed=ends(False))


def contexts(rows: Sequence[ScoredRow], *, threshold: float, k: int = 10) -> Contexts:
    """The k highest- and k lowest-scoring texts, each high-scoring one with the most similar low-scoring text.

    Args:
        rows: scored traffic. Of equal texts, only the copy with the highest score is shown.
        threshold: score from clean traffic. Only rows at or below it can be look-alikes.
        k: number of texts at either end.
    """
    ordered = sorted(rows, key=lambda row: (row.text, -row.pooled))
    grouped = [list(same) for _, same in groupby(ordered, key=lambda row: row.text)]
    best = sorted(((same[0], len(same)) for same in grouped), key=lambda pair: (-pair[0].pooled, pair[0].text))
    texts = [row.text for row, _ in best]
    low = np.array([row.pooled <= threshold for row, _ in best], dtype=bool)
    grams = _trigram_vectors(texts)
    top: list[Context] = []
    for i, (row, copies) in enumerate(best[:k]):
        similarity = np.where(low & (np.arange(len(best)) != i), (grams @ grams[[i]].T).toarray()[:, 0], -1.0)
        nearest = int(similarity.argmax())
        found = similarity[nearest] >= 0
        top.append(Context(row, copies, best[nearest][0] if found else None, float(max(similarity[nearest], 0.0))))
    bottom = [Context(row, copies, None, 0.0) for row, copies in reversed(best[-k:])]
    return Contexts(tuple(top), tuple(bottom))


def _trigram_vectors(texts: Sequence[str]) -> csr_array:
    """Byte-trigram counts of each text, as rows of norm 1."""
    rows: list[NDArray[np.int64]] = []
    columns: list[NDArray[np.int64]] = []
    for i, text in enumerate(texts):
        raw = np.frombuffer(text.encode(errors="replace").ljust(NGRAM), dtype=np.uint8).astype(np.int64)
        columns.append(raw[:-2] << 16 | raw[1:-1] << 8 | raw[2:])
        rows.append(np.full(len(raw) - 2, i))
    if not rows:
        return csr_array((0, 1))
    _, column = np.unique(np.concatenate(columns), return_inverse=True)
    row = np.concatenate(rows)
    counts = csr_array((np.ones(len(row)), (row, column)))  # duplicates are summed
    counts.data /= np.repeat(np.sqrt(counts.power(2).sum(axis=1)), np.diff(counts.indptr))
    return counts
