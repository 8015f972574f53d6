"""The rows furthest out at each end: merging, ties, ends, files."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from molehunt.errors import InvalidInput, UsageError
from molehunt.traffic.turn import Turn
from molehunt.watch import extremes
from molehunt.watch.extremes import (
    ANSWER_CHARS,
    FILE,
    KEPT,
    PROMPT_CHARS,
    WHOLE_CHARS,
    DistinctPrompts,
    ExtremeRow,
    Extremes,
    Inputs,
    RowText,
    whole_prompt,
)
from molehunt.watch.saved_state import METADATA

COLUMNS = 2
KEEP = 3
IDENTITY = {"tuned model": "a", "set of directions": "b"}
VALUE = st.sampled_from([-1.5, -1.0, 0.0, 0.5, 2.0, float("inf"), -float("inf")])
ROWS = st.lists(st.lists(VALUE, min_size=2 * COLUMNS, max_size=2 * COLUMNS), max_size=12).map(
    lambda rows: torch.tensor(rows).reshape(-1, 2 * COLUMNS)
)


def text(row: int) -> RowText:
    return RowText(f"prompt {row}", f"answer {row}")


def one_pass(values: Tensor, rows: list[int]) -> Extremes:
    return Extremes.empty(COLUMNS, KEEP).add(values, rows, {row: text(row) for row in rows})


def same(a: Extremes, b: Extremes) -> bool:
    return a.values.equal(b.values) and a.rows.equal(b.rows) and a.texts == b.texts


@given(ROWS, st.data())
def test_parts_in_any_order_and_again_equal_one_pass(values: Tensor, data: st.DataObject) -> None:
    numbers = list(range(1, len(values) + 1))
    whole = one_pass(values, numbers)
    owner = data.draw(st.lists(st.integers(0, 2), min_size=len(values), max_size=len(values)))
    parts = []
    for part in range(3):
        mine = [i for i, who in enumerate(owner) if who == part]
        parts.append(one_pass(values[mine], [numbers[i] for i in mine]))
    merged = Extremes.empty(COLUMNS, KEEP)
    for part in data.draw(st.permutations([0, 1, 2, 0])):  # one of them twice
        merged.merge(parts[part])
    assert same(merged, whole)
    added = one_pass(values[::2], numbers[::2])
    added.add(values, numbers, {row: text(row) for row in numbers})  # half of them are known
    assert same(added, whole)


@given(ROWS)
def test_they_are_what_sorting_gives_and_the_first_of_equal_rows(values: Tensor) -> None:
    found = one_pass(values, list(range(1, len(values) + 1)))
    for column in range(COLUMNS):
        for high in (True, False):
            own = values[:, column if high else COLUMNS + column].tolist()
            ranked = sorted(((-v, row) for row, v in enumerate(own, 1) if v > -float("inf")))[:KEEP]
            sign = 1 if high else -1
            expected = tuple(ExtremeRow(row, sign * -v + 0.0, *text(row)) for v, row in ranked)
            assert found.end(column, high=high) == expected
    assert set(found.texts) == {row for row in found.rows.flatten().tolist() if row}


def test_a_low_end_tells_the_columns_own_values() -> None:
    found = Extremes.empty(1).add(torch.tensor([[0.5, 0.25], [0.75, -0.0]]), [1, 2])
    assert [(one.row, one.value) for one in found.end(0, high=True)] == [(2, 0.75), (1, 0.5)]
    assert [(one.row, str(one.value)) for one in found.end(0, high=False)] == [(1, "-0.25"), (2, "0.0")]
    assert found.end(0, high=True)[0].prompt == ""


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        (torch.full((1, 4), torch.nan), [1]),
        (torch.zeros(2, 4), [1]),
        (torch.zeros(1, 3), [1]),
        (torch.zeros(2, 4), [1, 1]),
        (torch.zeros(1, 4), [0]),
    ],
)
def test_what_cannot_be_ranked_is_refused(values: Tensor, rows: list[int]) -> None:
    found = Extremes.empty(COLUMNS)
    with pytest.raises(ValueError):
        found.add(values, rows)
    assert not found.rows.any()
    with pytest.raises(ValueError, match="cannot merge"):
        found.merge(Extremes.empty(COLUMNS + 1))


def test_long_texts_keep_beginning_and_end_and_turns_stand_below_each_other() -> None:
    turns = (Turn("system", "a" * 300), Turn("user", "b" * 300))
    cut = RowText.of(turns, "x" * 150 + "y" * 150)
    assert len(cut.prompt) == PROMPT_CHARS and len(cut.answer) == ANSWER_CHARS
    assert cut.prompt.startswith("aaa") and cut.prompt.endswith("bbb") and "…" in cut.prompt
    assert cut.answer == "x" * 99 + "…" + "y" * 100
    assert RowText.of((Turn("system", "s"), Turn("user", "u")), "") == ("s\nu", "")


def judged(no_text: bool = False) -> Inputs:
    inputs = Inputs.empty(COLUMNS, no_text=no_text)
    values = torch.arange(20.0).reshape(5, 4)
    flagged = torch.tensor([False, True, False, False, True])
    inputs.take(values, [1, 2, 3, 4, 5], [text(row) for row in range(1, 6)], flagged)
    return inputs


def test_flagged_rows_are_not_absorbed() -> None:
    inputs = judged()
    assert [one.row for one in inputs.unflagged.end(0, high=True)] == [4, 3, 1]
    assert [one.row for one in inputs.quarantined.end(0, high=True)] == [5, 2]
    assert set(inputs.unflagged.texts) == {1, 3, 4} and set(inputs.quarantined.texts) == {2, 5}


def test_shards_merge() -> None:
    values = torch.arange(20.0).reshape(5, 4)
    left, right = Inputs.empty(COLUMNS), Inputs.empty(COLUMNS)
    flagged = torch.tensor([False, True, False, False, True])
    left.take(values[::2], [1, 3, 5], [text(row) for row in (1, 3, 5)], flagged[::2])
    right.take(values[1::2], [2, 4], [text(row) for row in (2, 4)], flagged[1::2])
    merged = left.merge(right)
    assert same(merged.unflagged, judged().unflagged) and same(merged.quarantined, judged().quarantined)


def test_they_come_back_from_disk_with_or_without_text(tmp_path: Path) -> None:
    assert not Inputs.load(tmp_path, IDENTITY, COLUMNS).unflagged.rows.any()
    judged().save(tmp_path, IDENTITY)
    again = Inputs.load(tmp_path, IDENTITY, COLUMNS)
    assert same(again.unflagged, judged().unflagged) and same(again.quarantined, judged().quarantined)
    silent = Inputs.load(tmp_path, IDENTITY, COLUMNS, no_text=True)
    assert (
        silent.no_text
        and not silent.unflagged.texts
        and [one.row for one in silent.unflagged.end(0, high=True)] == [4, 3, 1]
    )
    silent.save(tmp_path, IDENTITY)  # what an earlier run kept is gone
    assert b"prompt" not in (tmp_path / FILE).read_bytes() and list(tmp_path.iterdir()) == [tmp_path / FILE]
    judged(no_text=True).save(tmp_path, IDENTITY)
    assert not Inputs.load(tmp_path, IDENTITY, COLUMNS).unflagged.texts


def test_another_watchs_and_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE
    judged().save(tmp_path, IDENTITY)
    with pytest.raises(UsageError, match=r"made for another tuned model\.\nGive another folder \(out\)"):
        Inputs.load(tmp_path, {**IDENTITY, "tuned model": "c"}, COLUMNS)
    with pytest.raises(InvalidInput, match="is no list of inputs of a watch"):
        Inputs.load(tmp_path, IDENTITY, COLUMNS + 1)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[METADATA])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def changed(payload: dict | None = None, **replaced: Tensor) -> None:
        save_file({**tensors, **replaced}, path, {METADATA: json.dumps({**header, **(payload or {})})})

    changed({"schema": 99})
    with pytest.raises(InvalidInput, match="of schema 99; this version reads 3"):
        Inputs.load(tmp_path, IDENTITY, COLUMNS)
    for payload, replaced in (
        ({"what": "published range"}, {}),
        ({"identity": 3}, {}),
        ({"payload": {}}, {}),
        ({"payload": {"unflagged": {"1": ["a", "b", "c"]}, "quarantined": {}}}, {}),
        ({"payload": {"unflagged": {"x": ["a", "b"]}, "quarantined": {}}}, {}),
        ({}, {"unflagged.values": torch.full((4, KEPT), torch.nan)}),
        ({}, {"unflagged.values": torch.zeros(4, KEPT, dtype=torch.float64)}),
        ({}, {"unflagged.rows": torch.zeros(4, KEPT - 1, dtype=torch.int64)}),
    ):
        changed(payload, **replaced)
        with pytest.raises(InvalidInput, match="no list of inputs"):
            Inputs.load(tmp_path, IDENTITY, COLUMNS)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InvalidInput, match="no list of inputs"):
        Inputs.load(tmp_path, IDENTITY, COLUMNS)
    save_file(tensors, path)
    with pytest.raises(InvalidInput, match="no list of inputs"):
        Inputs.load(tmp_path, IDENTITY, COLUMNS)


def distinct(values: Tensor, prompts: list[str]) -> DistinctPrompts:
    return DistinctPrompts.empty(COLUMNS).add(values, prompts)


@given(ROWS, st.data())
def test_distinct_prompts_of_parts_in_any_order_and_again_equal_one_pass(values: Tensor, data: st.DataObject) -> None:
    prompts = data.draw(st.lists(st.sampled_from(["a", "A", "b c", "b  c", ""]), min_size=len(values), max_size=len(values)))  # fmt: skip
    whole = distinct(values, prompts)
    merged = DistinctPrompts.empty(COLUMNS)
    owner = data.draw(st.lists(st.integers(0, 2), min_size=len(values), max_size=len(values)))
    for part in data.draw(st.permutations([0, 1, 2, 0])):
        mine = [i for i, who in enumerate(owner) if who == part]
        merged.merge(distinct(values[mine], [prompts[i] for i in mine]))
    assert same(merged.extremes, whole.extremes) and merged.texts == whole.texts
    again = whole.copy().add(values, prompts)
    assert same(again.extremes, whole.extremes) and again.texts == whole.texts


def test_a_repeated_prompt_counts_once_at_its_furthest() -> None:
    values = torch.tensor([[1.0, 0, 0, 0], [3, 0, 0, 0], [2, 0, 0, 0]])
    found = distinct(values, ["go  on", "Go on", "stop"])
    assert found.extremes.values[0, :3].tolist() == [3, 2, -torch.inf] and set(found.texts.values()) == {
        "Go on",
        "stop",
    }
    found.add(torch.tensor([[0.0, 0, 0, 9]]), ["stop"])
    assert found.extremes.values[0, :2].tolist() == [3, 2] and found.extremes.values[3, 0] == 9
    with pytest.raises(ValueError, match="NaN"):
        found.add(torch.full((1, 4), torch.nan), ["x"])
    with pytest.raises(ValueError, match="cannot merge"):
        found.merge(DistinctPrompts.empty(COLUMNS + 1))


def test_the_sample_of_prompts_is_bounded_and_does_not_depend_on_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extremes, "SAMPLED", 20)
    rng = torch.Generator().manual_seed(0)
    values, prompts = torch.rand(300, 4, generator=rng), [f"prompt {i}" for i in range(300)]
    found = distinct(values, prompts)
    assert 20 <= len(found.texts) <= 20 + 4 * KEPT
    order = torch.randperm(300, generator=rng)
    turned = DistinctPrompts.empty(COLUMNS)
    for part in order.split(50):
        turned.add(values[part], [prompts[i] for i in part])
    assert same(turned.extremes, found.extremes) and turned.texts == found.texts


def test_words_in_the_middle_of_a_long_prompt_are_counted_whether_rows_are_flagged_or_not(tmp_path: Path) -> None:
    n = 60
    inputs = Inputs.empty(COLUMNS)
    values = torch.rand(n, 4, generator=torch.Generator().manual_seed(0))
    values[:12, 2] += 5
    filler = " ".join(f"filler{j}" for j in range(60))
    turns = [Turn("user", f"{filler} {'xyzzy' if i < 12 else ''} {i} {filler}") for i in range(n)]
    texts = [RowText.of((turn,), "") for turn in turns]
    assert not any("xyzzy" in one.prompt for one in texts)
    flagged = torch.tensor([i % 2 > 0 for i in range(n)])
    inputs.take(values, list(range(1, n + 1)), texts, flagged, [whole_prompt((turn,)) for turn in turns])
    inputs.save(tmp_path, IDENTITY)
    again = Inputs.load(tmp_path, IDENTITY, COLUMNS)
    for each in (inputs, again, Inputs.empty(COLUMNS).merge(again), again.copy()):
        (one,) = each.prompts.shared_words()
        assert (one.run, one.rows) == (("xyzzy",), 12) and (one.ends[0].direction, one.ends[0].high) == (0, False)
    silent = Inputs.load(tmp_path, IDENTITY, COLUMNS, no_text=True)
    assert not silent.prompts.texts and silent.prompts.shared_words() == ()
    silent.take(values, list(range(1, n + 1)), texts, flagged)
    assert not silent.prompts.texts
    assert len(whole_prompt((Turn("user", "x" * 10_000),))) == WHOLE_CHARS


def test_altered_prompts_are_refused_and_hostile_ones_come_back(tmp_path: Path) -> None:
    hostile = ["\ud800", "\x00\x1b", '"}{', "", "漢字" * 3000]
    inputs = Inputs.empty(COLUMNS)
    inputs.take(torch.rand(5, 4), [1, 2, 3, 4, 5], [text(i) for i in range(5)], torch.zeros(5, dtype=torch.bool), hostile)  # fmt: skip
    inputs.save(tmp_path, IDENTITY)
    assert Inputs.load(tmp_path, IDENTITY, COLUMNS).prompts.texts == inputs.prompts.texts
    path = tmp_path / FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for spoiled in (b"{}", b"[1]", b'{"x": "y"}', b"{", b"\xff", b"[" * 100_000):
        save_file({**tensors, "distinct.texts": torch.frombuffer(bytearray(spoiled), dtype=torch.uint8)}, path, metadata)  # fmt: skip
        with pytest.raises(InvalidInput, match="no list of inputs"):
            Inputs.load(tmp_path, IDENTITY, COLUMNS)
    for name in ("distinct.values", "distinct.rows"):
        save_file({**tensors, name: tensors[name][:-1]}, path, metadata)
        with pytest.raises(InvalidInput, match="no list of inputs"):
            Inputs.load(tmp_path, IDENTITY, COLUMNS)


def test_a_thousand_directions_stay_small() -> None:
    found = Extremes.empty(2000)
    rng = torch.Generator().manual_seed(0)
    for start in range(0, 600, 200):
        numbers = list(range(start + 1, start + 201))
        found.add(
            torch.randn(200, 4000, generator=rng), numbers, {row: RowText("p" * 400, "a" * 200) for row in numbers}
        )
    assert found.values.nbytes + found.rows.nbytes < 5e5 and len(found.texts) <= 600
