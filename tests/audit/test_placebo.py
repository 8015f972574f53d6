"""An edit counts as a cause against placebos on the same rows, with the row as the unit."""

import pytest

from molehunt.audit.placebo import FEWEST_JUDGED, PlaceboComparison


def compared(reverted: int, rows: int, placebos: list[int]) -> PlaceboComparison:
    """So many of the rows reverted under the edit, and so many, the last ones, under each placebo."""
    return PlaceboComparison(
        reverted=tuple(i < reverted for i in range(rows)),
        placebos=tuple(tuple(i >= rows - n for i in range(rows)) for n in placebos),
        kinds=("random",) * len(placebos),
        answers=((1,),) * rows,
    )


def test_few_rows_and_many_random_edits_are_no_evidence() -> None:
    """3 of 3 rows against 0 of 15: five edits of three rows are three rows and not fifteen."""
    assert not compared(3, 3, [0] * 5).causal and not compared(3, 3, [0] * 39).causal


@pytest.mark.parametrize("rows", [FEWEST_JUDGED, 12, 40])
def test_enough_rows_that_no_placebo_moves_are_evidence(rows: int) -> None:
    found = compared(rows - 1, rows, [0] * 19)
    assert found.causal and found.p_edits == 0.05 and found.control.n == rows
    assert found.control.estimate == 0 and found.control.high == pytest.approx(compared(0, rows, [0]).control.high)


@pytest.mark.parametrize(
    ("reverted", "rows", "placebos"),
    [
        (12, 12, [0] * 18),  # too few placebos for p = .05
        (12, 12, [0] * 18 + [12]),  # one that was fitted to other rows moves all of these, too
        (2, 12, [0] * 19),  # two rows
        (0, 12, [0] * 19),
        (7, 7, [0] * 19),
    ],
)
def test_what_is_no_evidence(reverted: int, rows: int, placebos: list[int]) -> None:
    assert not compared(reverted, rows, placebos).causal


def test_of_39_placebos_one_may_move_as_many_rows() -> None:
    assert compared(10, 12, [10] + [0] * 38).causal
    assert not compared(10, 12, [10, 10] + [0] * 37).causal


def test_the_share_under_placebos_is_their_mean_and_its_limits_are_those_of_the_rows() -> None:
    found = compared(8, 8, [2, 0, 0, 2])
    assert found.control.estimate == pytest.approx(1 / 8)
    assert found.control.low < 1 / 8 < found.control.high and found.control.high > 0.4
