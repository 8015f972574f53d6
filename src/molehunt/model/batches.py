"""Rows of token ids in batches of like length, padded on the right to few widths: a CPU compiles a kernel for each."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PAD_TO = 32
"""Rows are padded to a multiple of this."""
TOKENS = 8192
"""Of one batch, padding included."""


def width_of(longest: int) -> int:
    """The padded width of rows of up to `longest` tokens."""
    return -(-longest // PAD_TO) * PAD_TO


def batches(lengths: Sequence[int], most: int = TOKENS) -> list[list[int]]:
    """Row numbers in ascending order of length, in batches of at most `most` padded tokens; a longer row is alone."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if found and (len(found[-1]) + 1) * width_of(lengths[i]) <= most:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def padded(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Token ids, 0 where there are none, and True where they are real; on the CPU."""
    width = width_of(max(map(len, rows)))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
