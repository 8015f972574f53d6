"""What a direction stands for: tokens it promotes, and contexts it fires on beside their look-alikes."""

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
"""Bytes in a fragment when texts are compared."""


@dataclass(frozen=True, slots=True)
class TokenEffect:
    """One vocabulary entry under a direction."""

    token: str
    token_id: int
    logit: float
    """Added by a residual stream that lies along the direction."""
    z: float
    """The same in standard deviations over the vocabulary."""


@dataclass(frozen=True, slots=True)
class TokenReadout:
    """The tokens that a direction makes likelier and less likely, strongest first."""

    promoted: tuple[TokenEffect, ...]
    suppressed: tuple[TokenEffect, ...]


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One text and what a detector said of it. Raises ValueError unless every token has a score."""

    text: str
    tokens: tuple[str, ...]
    """As to be shown; concatenated they are the text, or stand for it."""
    scores: tuple[float, ...]
    """One per token."""
    pooled: float
    """The row's own score."""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.scores):
            raise ValueError(f"{len(self.tokens)} tokens cannot carry {len(self.scores)} scores")


@dataclass(frozen=True, slots=True)
class Context:
    """A row and the nearest text on the other side of the threshold: the difference is what the score saw."""

    row: ScoredRow
    copies: int
    """How many rows hold exactly this text."""
    lookalike: ScoredRow | None
    """None when no row lies on the other side."""
    similarity: float
    """Cosine over byte trigrams, 0 to 1; 0 without a look-alike."""


@dataclass(frozen=True, slots=True)
class Contexts:
    """Highest-scoring texts with look-alikes that score low, and lowest-scoring ones without."""

    top: tuple[Context, ...]
    bottom: tuple[Context, ...]


@torch.no_grad()
def lens_logits(
    vectors: Float[Tensor, "k d_model"],
    final_norm: Callable[[Tensor], Tensor],
    unembedding: Float[Tensor, "vocab d_model"],
) -> Float[Tensor, "k vocab"]:
    """Logits of residual streams that lie along unit `vectors`: the logit lens, through the model's own norm.

    The norm itself is applied, not its weights: whatever a family does with its gain (Gemma adds 1) or mean
    is right, and `final_norm(0)` takes a LayerNorm's bias off. Length does not matter to a norm but for its
    epsilon, so each vector is given root mean square 1. A soft cap on logits is left out: it keeps the order.

    Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
    """
    stream = vectors.to(unembedding) * vectors.shape[1] ** 0.5
    written = final_norm(stream) - final_norm(torch.zeros_like(stream))
    return (written.to(unembedding) @ unembedding.mT).float()


def token_readout(logits: Float[Tensor, " vocab"], decode: Callable[[int], str], *, k: int = 10) -> TokenReadout:
    """The k tokens at either end of one row of `lens_logits`; `decode` turns a token id into text."""
    spread = logits.std(correction=0)
    z = (logits - logits.mean()) / spread if spread > 0 else torch.zeros_like(logits)
    k = min(k, len(logits))

    def ends(largest: bool) -> tuple[TokenEffect, ...]:
        ids = logits.topk(k, largest=largest).indices.tolist()
        return tuple(TokenEffect(decode(i), i, float(logits[i]), float(z[i])) for i in ids)

    return TokenReadout(promoted=ends(True), suppressed=ends(False))


def contexts(rows: Sequence[ScoredRow], *, threshold: float, k: int = 10) -> Contexts:
    """The k highest- and lowest-scoring texts, each high one beside the nearest text that scores low.

    Args:
        rows: scored traffic; equal texts are shown once, by their highest copy.
        threshold: from clean traffic. Rows at or under it do not score high; rows over it are no look-alikes.
        k: texts at either end. The top holds rows over the threshold first, then simply the highest.
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
    """Byte-trigram counts of each text, as unit rows."""
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
