"""Which rows of traffic go through the models together, and which of these batches make one shard of a store."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NARROWEST = 16
"""Smallest number of positions that rows are padded to."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that go through the models together."""

    width: int
    """Number of positions that each row is padded to."""
    documents: tuple[int, ...]
    """0-based rows of the traffic."""


def plan(
    rows: Sequence[Sequence[int]], *, shard_tokens: int, batch_tokens: int, longest: int | None = None
) -> list[list[Batch]]:
    """Which rows go through the models together, and which batches make a shard.

    Rows wait by padded width until they fill a batch, so every shard holds rows of all lengths. No row is padded beyond
    `longest` positions.

    Raises ValueError unless both sizes are positive.
    """
    if shard_tokens < 1 or batch_tokens < 1:
        raise ValueError(f"shard_tokens {shard_tokens} and batch_tokens {batch_tokens} must be positive")
    shards: list[list[Batch]] = []
    filled = shard_tokens
    for batch in _batched(rows, min(batch_tokens, shard_tokens), longest):
        tokens = sum(len(rows[document]) for document in batch.documents)
        if filled + tokens > shard_tokens:
            shards.append([])
            filled = 0
        shards[-1].append(batch)
        filled += tokens
    return shards


def documents_of(batches: Sequence[Batch]) -> list[int]:
    """Rows of the traffic in the order in which a shard holds them."""
    return [document for batch in batches for document in batch.documents]


def _batched(rows: Sequence[Sequence[int]], batch_tokens: int, longest: int | None) -> Iterator[Batch]:
    waiting: defaultdict[int, list[int]] = defaultdict(list)
    for document, row in enumerate(rows):
        width = padded(len(row)) if longest is None else min(padded(len(row)), longest)
        waiting[width].append(document)
        if (len(waiting[width]) + 1) * width > batch_tokens:
            yield Batch(width, tuple(waiting.pop(width)))
    for width in sorted(waiting):
        yield Batch(width, tuple(waiting[width]))


def padded(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, … that holds `length` tokens: at most half as long again."""
    width = NARROWEST
    while width < length:
        width = width * 3 // 2 if width.bit_count() == 1 else width * 4 // 3
    return width
