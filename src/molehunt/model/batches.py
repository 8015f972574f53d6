"""Rows of token ids in batches of similar length, padded on the right to few widths: a CPU compiles a kernel per width."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PAD_TO = 32
"""Rows are padded to a multiple of this."""
TOKENS = 8192
"""Greatest number of tokens of one batch, including padding."""


def width_of(longest: int) -> int:
    """The padded width of rows of up to `longest` tokens."""
    return -(-longest // PAD_TO) * PAD_TO


def batches(lengths: Sequence[int], max_tokens: int = TOKENS) -> list[list[int]]:
    """Row numbers in ascending order of length, in batches of at most `max_tokens` padded tokens.

    A longer row has a batch of its own.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if found and (len(found[-1]) + 1) * width_of(lengths[i]) <= max_tokens:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def padded(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Padded token ids (padding is 0) and a mask that is True at real tokens, on the CPU."""
    width = width_of(max(map(len, rows)))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
