import hashlib
import json
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load, save
from torch import Tensor

from molehunt.errors import InvalidInput, NotTestable
from molehunt.watch import sketch as module
from molehunt.watch.sketch import KLL_K, RANK_ERROR, ScoreSketch

COLUMNS = 3
# Width 16: many ties, both zeros, infinities.
VALUE = st.floats(-3, 3, width=16) | st.sampled_from([math.inf, -math.inf])
ROWS = st.integers(0, 30).flatmap(lambda n: arrays(np.float32, (n, COLUMNS), elements=VALUE)).map(torch.from_numpy)
KEPT = st.integers(1, 12)


def sketch_of(*parts: Tensor, kept: int = 64) -> ScoreSketch:
    sketch = ScoreSketch.empty(parts[0].shape[1], kept)
    for part in parts:
        sketch.add(part)
    return sketch


def assert_equal(one: ScoreSketch, other: ScoreSketch) -> None:
    assert (one.columns, one.kept, one.n) == (other.columns, other.kept, other.n)
    assert torch.equal(one.high_tail, other.high_tail) and torch.equal(one.low_tail, other.low_tail)


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(ROWS, KEPT)
def test_tails_are_the_ends_of_the_sorted_rows(rows: Tensor, kept: int) -> None:
    sketch = sketch_of(rows, kept=kept)
    ascending = np.sort(rows.numpy(), axis=0)
    assert sketch.n == len(rows)
    assert np.array_equal(sketch.low_tail.numpy(), ascending[:kept])
    assert np.array_equal(sketch.high_tail.numpy(), ascending[::-1][:kept])
    if len(rows):
        assert np.array_equal(sketch.low.numpy(), ascending[0]) and np.array_equal(sketch.high.numpy(), ascending[-1])


@given(ROWS, ROWS, ROWS, KEPT)
def test_shards_merged_in_any_order_equal_one_pass(a: Tensor, b: Tensor, c: Tensor, kept: int) -> None:
    def part(rows: Tensor) -> ScoreSketch:
        return sketch_of(rows, kept=kept)

    whole = part(torch.cat([a, b, c]))
    assert_equal(part(a).merge(part(b)).merge(part(c)), whole)
    assert_equal(part(a).merge(part(b).merge(part(c))), whole)
    assert_equal(part(c).merge(part(a)).merge(part(b)), whole)
    assert_equal(sketch_of(a, b, c, kept=kept), whole)
    assert_equal(part(a).merge(part(a[:0])), part(a))
    merged = part(a).merge(part(b)).merge(part(c))
    n = whole.n
    for rank in {*range(1, min(n, kept) + 1), *range(max(1, n - kept + 1), n + 1)}:
        assert torch.equal(merged.order_statistic(rank), whole.order_statistic(rank))
    assert_equal(part(a), sketch_of(a, kept=kept))  # nothing that was merged has changed


@given(ROWS.filter(len), KEPT, st.sampled_from([0.0, 0.01, 0.07, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0]))
def test_a_quantile_is_the_smallest_value_that_enough_rows_do_not_exceed(rows: Tensor, kept: int, q: float) -> None:
    found = sketch_of(rows, kept=kept).quantile(q)
    n = len(rows)
    percent = round(100 * q)
    rank = max(1, -(-percent * n // 100))  # in whole numbers
    assert torch.equal(found, rows.sort(0).values[rank - 1])  # these are so few that the middle is exact, too


@given(ROWS, KEPT, arrays(np.float32, COLUMNS, elements=VALUE).map(torch.from_numpy))
def test_at_least_counts(rows: Tensor, kept: int, values: Tensor) -> None:
    assert torch.equal(sketch_of(rows, kept=kept).at_least(values), (rows >= values).sum(0))
    if len(rows):  # ties with rows
        assert torch.equal(sketch_of(rows, kept=kept).at_least(rows[0]), (rows >= rows[0]).sum(0))


def test_at_least_is_exact_in_the_tails_and_near_in_the_middle() -> None:
    rows = normal(20_000, 4)
    shards = [sketch_of(shard) for shard in rows.split(3_000)]
    merged = shards[0]
    for shard in shards[1:]:
        merged.merge(shard)
    for sketch in (sketch_of(rows), merged):
        ascending = rows.sort(0).values
        for rank in (1, 2, 64, 65, 5_000, 10_000, 19_935, 19_936, 19_937, 20_000):
            value = ascending[rank - 1]
            exact, found = (rows >= value).sum(0), sketch.at_least(value)
            off = (found - exact).abs().max() / len(rows)
            assert off == 0 if rank <= 64 or rank > 20_000 - 64 + 1 else off < 3 * RANK_ERROR, rank
            order = sketch.order_statistic(rank)
            if rank <= 64 or rank > 20_000 - 64:
                assert torch.equal(order, value)
            else:
                assert ((rows <= order).sum(0) - rank).abs().max() < 3 * RANK_ERROR * len(rows)
    beyond = torch.full((4,), math.inf)
    assert merged.at_least(beyond).tolist() == [0] * 4 and merged.at_least(-beyond).tolist() == [20_000] * 4


def test_an_estimate_never_contradicts_the_tails() -> None:
    """Just inside the tails the middle knows next to nothing: one of its items stands for a hundred rows."""
    rows = normal(20_000, 100)
    sketch = sketch_of(rows, kept=16)
    inside = rows.sort(0).values
    for value in (inside[-17], inside[16]):
        exact = (rows >= value).sum(0)
        found = sketch.at_least(value)
        assert ((found >= 16) & (found <= 20_000 - 16)).all() and not torch.equal(found, exact)
    assert (sketch.order_statistic(20_000 - 16) <= sketch.high_tail[-1]).all()
    assert (sketch.order_statistic(17) >= sketch.low_tail[-1]).all()


@pytest.mark.parametrize(("q", "n", "rank"), [(0.07, 100, 7), (0.28, 25, 7), (0.29, 100, 29), (0.93, 100, 93)])
def test_no_rank_of_a_quantile_is_lost_to_rounding(q: float, n: int, rank: int) -> None:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).float()
    assert sketch_of(order[:, None]).quantile(q) == rank - 1


def test_the_rank_error_is_the_package_s_own() -> None:
    kll = sketch_of(torch.zeros(1, 1)).middle
    assert math.isclose(RANK_ERROR, kll.get_normalized_rank_error(KLL_K, False), rel_tol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_enter_as_float32(dtype: torch.dtype) -> None:
    rows = normal(10, 2).to(dtype)
    assert_equal(sketch_of(rows.requires_grad_()), sketch_of(rows.detach().float()))


def test_what_cannot_be_ranked_is_refused_and_nothing_is_taken_in() -> None:
    sketch = sketch_of(normal(5, 2))
    before = sketch.to_bytes()
    bad = torch.tensor([[1.0, math.nan]])
    for refused in (
        lambda: sketch.add(bad),
        lambda: sketch.at_least(bad[0]),
        lambda: sketch.add(torch.zeros(1, 3)),
        lambda: sketch.at_least(torch.zeros(3)),
        lambda: sketch.merge(ScoreSketch.empty(3)),
        lambda: sketch.merge(ScoreSketch.empty(2, kept=65)),
        lambda: sketch.merge(sketch),
        lambda: sketch.quantile(1.1),
        lambda: sketch.order_statistic(0),
        lambda: sketch.order_statistic(6),
        lambda: ScoreSketch.empty(0),
        lambda: ScoreSketch.empty(1, kept=0),
    ):
        with pytest.raises(ValueError):
            refused()
    assert sketch.to_bytes() == before


def test_before_the_first_row() -> None:
    sketch = ScoreSketch.empty(2)
    assert sketch.high.tolist() == [-math.inf] * 2 and sketch.low.tolist() == [math.inf] * 2
    assert sketch.at_least(torch.zeros(2)).tolist() == [0, 0]
    with pytest.raises(NotTestable, match="Calibrate"):
        sketch.quantile(0.5)
    assert_equal(ScoreSketch.from_bytes(sketch.to_bytes()), sketch)
    assert_equal(ScoreSketch.from_bytes(sketch.add(torch.zeros(0, 2)).to_bytes()), sketch)


@pytest.mark.parametrize("rows", [1, 64, 65, 130, 5_000])
def test_a_restart_answers_alike_and_goes_on(rows: int) -> None:
    values = normal(rows, 3)
    sketch = sketch_of(values)
    sketch.at_least(values[0])  # a query of one column alone changes a flag in that column's state
    again = ScoreSketch.from_bytes(sketch.to_bytes())
    assert_equal(again, sketch)
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert torch.equal(again.quantile(q), sketch.quantile(q))
    assert torch.equal(again.at_least(torch.zeros(3)), sketch.at_least(torch.zeros(3)))
    more = normal(100, 3, seed=1)
    assert_equal(again.add(more), sketch_of(torch.cat([values, more])))
    assert (again.middle.get_n() == rows + 100).all()


def test_the_state_stays_small_for_a_thousand_columns() -> None:
    sketch = sketch_of(normal(3_000, 1_000))
    for _ in range(10):
        sketch.merge(ScoreSketch.from_bytes(sketch.to_bytes()))
    assert sketch.n == 3_000 * 2**10
    assert len(sketch.to_bytes()) < 2.5e6  # the promise is 5 MB


# What strangers may write


def header_of(data: bytes) -> dict[str, object]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def signed(tensors: dict[str, Tensor], schema: str = "1") -> bytes:
    """A file with a right checksum, whatever it holds."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(tensors, {"molehunt_sketch": f"{schema} {module._checksum(tensors)}"})


STATE = sketch_of(normal(3_000, 2), kept=8).to_bytes()


def altered(**changes: object) -> bytes:
    tensors = load(STATE)
    for name, change in changes.items():
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name].clone()) if name in tensors else change(torch.zeros(2, 2))
    return signed(tensors)


def put(at: object, value: float) -> object:
    def change(tensor: Tensor) -> Tensor:
        tensor[at] = value
        return tensor

    return change


def header_field(format: str, offset: int, value: int) -> object:
    def change(middle: Tensor) -> Tensor:
        data = torch.frombuffer(bytearray(struct.pack(format, value)), dtype=torch.uint8)
        middle[:, offset : offset + len(data)] = data
        return middle

    return change


def item(value: float) -> object:
    def change(middle: Tensor) -> Tensor:
        middle[1, -4:] = torch.frombuffer(bytearray(struct.pack("<f", value)), dtype=torch.uint8)
        return middle

    return change


def test_the_state_is_a_safetensors_file_with_its_schema() -> None:
    assert header_of(STATE)["__metadata__"] == {"molehunt_sketch": f"1 {module._checksum(load(STATE))}"}
    assert signed(load(STATE)) == STATE
    ScoreSketch.from_bytes(STATE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no whole safetensors"),
        (b"not a sketch at all", "no whole safetensors"),
        (STATE[:-1], "no whole safetensors"),
        (STATE[:-1] + bytes([STATE[-1] ^ 1]), "checksum"),
        (save({"x": torch.zeros(1)}), "schema is unknown"),
        (signed(load(STATE), "2"), "schema is 2"),
        (save(load(STATE), {"molehunt_sketch": "1"}), "checksum"),
        (save({"x": torch.zeros(1, dtype=torch.bfloat16)}, {"molehunt_sketch": "1"}), "not those of a sketch"),
        (altered(high=None), "not those of a sketch"),
        (altered(extra=lambda t: t), "not those of a sketch"),
        (altered(high=lambda t: t.double()), "not those of a sketch"),
        (altered(low=lambda t: t[0]), "not those of a sketch"),
        (altered(counts=lambda t: t[:1]), "counts"),
        (altered(counts=put(0, -1)), "counts"),
        (altered(counts=put(1, 0)), "counts"),
        (altered(counts=put(1, 9)), "tails"),
        (altered(high=lambda t: t[:, :1]), "tails"),
        (altered(high=lambda t: t[:, :0], low=lambda t: t[:, :0]), "tails"),
        (altered(high=lambda t: t.flip(0)), "out of order"),
        (altered(low=lambda t: t.flip(0)), "out of order"),
        (altered(high=put(0, math.nan)), "out of order"),
        (altered(middle=None), "missing"),
        (signed({**load(sketch_of(normal(3, 2)).to_bytes()), "middle": load(STATE)["middle"]}), "there should be none"),
        (altered(middle=lambda t: t[:1]), "cut"),
        (altered(middle=lambda t: t[:, :19]), "cut"),
        (altered(middle=lambda t: t[:, :30]), "differ in shape|impossible levels"),
        (altered(middle=lambda t: t[:, :-4]), "impossible levels"),
        (altered(middle=put((1, 3), 4)), "flags"),
        (altered(middle=header_field("<B", 0, 2)), "another kind"),
        (altered(middle=header_field("<H", 4, 200)), "another kind"),
        (altered(middle=header_field("<B", 6, 7)), "another kind"),
        (altered(middle=header_field("<Q", 8, 3_001)), "another kind"),
        (altered(middle=header_field("<H", 16, 64)), "another kind"),
        (altered(middle=header_field("<B", 18, 0)), "another kind"),
        (altered(middle=header_field("<B", 18, 32)), "another kind"),
        (altered(middle=header_field("<I", 20, 2**32 - 1)), "impossible levels"),
        (altered(middle=header_field("<I", 24, 2**31)), "impossible levels"),
        (altered(middle=put((1, 20), 77)), "differ in shape"),
        (altered(middle=item(math.nan)), "NaN"),
        (altered(middle=item(99.0)), "out of range"),
        (altered(middle=header_field("<f", 20 + 4 * load(STATE)["middle"][0, 18], 0)), "disagree"),
        (altered(high=put((0, 0), 50)), "disagree"),
    ],
    ids=lambda of: of if isinstance(of, str) else "",  # safetensors writes tensors of one state in any order
)
def test_foreign_and_altered_bytes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ScoreSketch.from_bytes(data)


def test_levels_that_do_not_add_up_are_refused() -> None:
    """One item is moved from level 0 to level 1, so that everything fits but the number of rows."""
    middle = load(STATE)["middle"]
    levels = int(middle[0, 18])
    offsets = struct.unpack(f"<{levels}I", middle[0, 20 : 20 + 4 * levels].numpy().tobytes())
    assert offsets[1] > offsets[0], "level 0 holds something"
    with pytest.raises(InvalidInput, match="do not add up"):
        ScoreSketch.from_bytes(altered(middle=header_field("<I", 24, offsets[1] - 1)))


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), min_size=1, max_size=3))
def test_no_altered_header_of_the_middle_brings_the_process_down(changes: list[tuple[int, int]]) -> None:
    """Without the check, one such header in fifty is a segmentation fault."""
    middle = load(STATE)["middle"]
    for at, value in changes:
        middle[:, at] = value
    try:
        sketch = ScoreSketch.from_bytes(altered(middle=lambda _: middle))
    except InvalidInput:
        return
    sketch.add(normal(500, 2)).quantile(0.5)
    sketch.at_least(torch.zeros(2))


def test_every_flipped_byte_is_noticed() -> None:
    for at in range(0, len(STATE), 23):
        flipped = bytearray(STATE)
        flipped[at] ^= 0x41
        with pytest.raises(InvalidInput):
            ScoreSketch.from_bytes(bytes(flipped))


def test_the_checksum_covers_names_and_shapes() -> None:
    one = module._checksum({"a": torch.zeros(2, 3)})
    assert len({one, module._checksum({"b": torch.zeros(2, 3)}), module._checksum({"a": torch.zeros(3, 2)})}) == 3
    assert len(one) == len(hashlib.sha256().hexdigest())
