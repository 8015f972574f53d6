import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehunt.traffic.split import (
    Calibrate,
    Fit,
    Fractions,
    Select,
    Split,
    Splits,
    Test,
    WrongSplit,
    expect,
    split_rows,
)


def parts(splits: Splits[object]) -> list[Split[object]]:
    return [getattr(splits, field.name) for field in dataclasses.fields(splits)]


ROWS = st.lists(st.text(max_size=4), max_size=60)


@given(ROWS, st.integers(0, 99))
def test_each_row_lands_in_exactly_one_split_in_order(rows: list[str], seed: int) -> None:
    numbered = list(enumerate(rows))
    splits = split_rows(numbered, seed=seed, key=lambda row: row[1])
    assert sorted(row for split in parts(splits) for row in split) == numbered
    assert all(list(split) == sorted(split) for split in parts(splits))
    keys = [{key for _, key in split} for split in parts(splits)]
    assert sum(map(len, keys)) == len(set(rows)), "rows with one key stay together"


@given(ROWS, ROWS, st.integers(0, 99))
def test_adding_rows_moves_none(rows: list[str], more: list[str], seed: int) -> None:
    before = split_rows(rows, seed=seed, key=str)
    after = split_rows(more + rows, seed=seed, key=str)
    assert all(set(a) <= set(b) for a, b in zip(parts(before), parts(after), strict=True))


def test_the_shares_are_as_asked_and_the_seed_matters() -> None:
    rows = [f"row {i}" for i in range(4000)]
    splits = split_rows(rows, seed=0, key=str, fractions=Fractions(0.1, 0.2, 0.3, 0.4))
    assert [len(split) / 4000 for split in parts(splits)] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.03)
    assert [type(split) for split in parts(splits)] == [Fit, Calibrate, Select, Test]
    assert splits != split_rows(rows, seed=1, key=str, fractions=Fractions(0.1, 0.2, 0.3, 0.4))
    assert [len(s) for s in parts(split_rows(rows, seed=0, key=str, fractions=Fractions(1, 0, 0, 0)))] == [
        4000,
        0,
        0,
        0,
    ]
    assert [len(s) for s in parts(split_rows(rows, seed=0, key=str, fractions=Fractions(0, 0, 0, 1)))] == [
        0,
        0,
        0,
        4000,
    ]


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5, -0.5), (0.1, 0.1, 0.1, 0.1)])
def test_fractions_add_up_to_one(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        split_rows([], seed=0, key=str, fractions=Fractions(*fractions))


def test_test_rows_cannot_be_opened_for_selection() -> None:
    kept = Select(("a", "b"))
    assert expect(Select, kept) is kept
    with pytest.raises(WrongSplit, match="reads the Select rows, and was given Test"):
        expect(Select, Test(("a",)))
    with pytest.raises(TypeError):
        expect(Select, ["a"])


CALLER = """
from molehunt.traffic.split import Select, Test, expect, split_rows

def choose(rows: Select[str]) -> str:
    return max(expect(Select, rows))

parts = split_rows(["a", "b"], seed=0, key=str)
choose(parts.select)
choose({given})
"""


@pytest.mark.parametrize(("given", "errors"), [("parts.select", 0), ("parts.test", 1), ("parts.fit", 1), ("('a',)", 1)])
def test_a_type_checker_refuses_the_wrong_split(given: str, errors: int, tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(CALLER.replace("{given}", given))
    (tmp_path / "pyrightconfig.json").write_text("{}")
    answer = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "-p", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert answer.stdout.count("reportArgumentType") == errors == answer.returncode, answer.stdout + answer.stderr
