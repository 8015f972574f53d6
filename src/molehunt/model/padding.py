"""Token rows of several lengths as one batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class PaddedRows(NamedTuple):
    """A batch of token rows, and where in it each row stands."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    """True at real tokens."""
    starts: list[int]
    """Position of each row's first token."""


def pad_rows(rows: Sequence[Sequence[int]], pad: int, width: int | None, *, left: bool) -> PaddedRows:
    """Put rows of token ids into one batch on the CPU.

    Args:
        rows: token ids of each row.
        pad: the token id that fills the rest.
        width: number of positions of every row; by default those of the longest.
        left: whether the padding stands before each row.

    Raises:
        ValueError: a row is longer than `width`.
    """
    longest = max(map(len, rows))
    if width is not None and longest > width:
        raise ValueError(f"a row of {longest} tokens is longer than pad_to={width}")
    width = longest if width is None else width
    tokens = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    starts = [width - len(row) if left else 0 for row in rows]
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = True
    return PaddedRows(tokens, mask, starts)
