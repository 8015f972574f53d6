"""Rows as one batch: every token stands once, where `starts` says, and padding is marked."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.model.padding import pad_rows

ROWS = st.lists(st.lists(st.integers(1, 99), max_size=6), min_size=1, max_size=5)


@given(ROWS, st.integers(0, 4), st.booleans())
def test_each_row_stands_at_its_start_and_all_else_is_padding(rows: list[list[int]], more: int, left: bool) -> None:
    width = max(map(len, rows)) + more
    batch = pad_rows(rows, 0, width, left=left)
    assert batch.tokens.shape == batch.mask.shape == (len(rows), width)
    for i, (row, start) in enumerate(zip(rows, batch.starts, strict=True)):
        assert start == (width - len(row) if left else 0)
        assert batch.tokens[i, start : start + len(row)].tolist() == row
        assert batch.tokens[i][batch.mask[i]].tolist() == row
    assert torch.equal(batch.mask, batch.tokens != 0)


def test_the_width_is_by_default_that_of_the_longest_row() -> None:
    assert pad_rows([[1], [1, 2, 3]], 7, None, left=False).tokens.tolist() == [[1, 7, 7], [1, 2, 3]]
    assert pad_rows([[1], [1, 2, 3]], 7, None, left=True).tokens.tolist() == [[7, 7, 1], [1, 2, 3]]


def test_a_row_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 3 tokens is longer than pad_to=2"):
        pad_rows([[1], [1, 2, 3]], 0, 2, left=False)
