"""A running summary of many score columns: exact tails, an approximate middle, bounded memory, shards that merge.

The middle is a KLL sketch a column (Karnin, Lang & Liberty, arXiv 1603.05346), by Apache DataSketches.
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import datasketches
import numpy as np
import torch
from jaxtyping import Float, Float32, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from molehunt.errors import InvalidInput, NotTestable, printable

SCHEMA = 1
METADATA = "molehunt_sketch"
"""Key of the file's metadata: schema version and checksum."""
KEPT = 64
KLL_K = 128
RANK_ERROR = 2.296 / KLL_K**0.9723
"""Rank error of the middle, as a share of the rows: DataSketches' own 99 % figure for one query at this k, 2.05 %."""

KLL_HEADER = struct.Struct("<BBBBHBxQHBx")  # ints, version, family, flags, k, m, n, min_k, levels
KINDS = {"counts": (torch.int64, 1), "high": (torch.float32, 2), "low": (torch.float32, 2), "middle": (torch.uint8, 2)}
"""Tensors of the file, dtype and axes; the middle is left out while the tails hold every row."""
MAX_LEVELS = 31
"""A sketch of 10¹¹ rows has fewer."""


@dataclass(eq=False)
class ScoreSketch:
    """The `kept` largest and smallest values of each column, and a sketch of the rest. Lies on the CPU.

    Law: sketches of shards, merged in any order, equal one pass over all rows in `n`, in both tails, and so in every
    answer whose rank lies in a tail. Answers from the middle are random within `RANK_ERROR`: the sketch tosses coins
    that no seed governs, so two runs differ there.
    """

    columns: int
    kept: int
    n: int
    """Rows taken in."""
    high_tail: Float32[Tensor, "rows columns"]
    """The min(n, kept) largest values of each column, largest first."""
    low_tail: Float32[Tensor, "rows columns"]
    """The same from below, smallest first."""
    middle: Any
    """The package has no types: `vector_of_kll_floats_sketches`, one sketch a column."""

    @classmethod
    def empty(cls, columns: int, kept: int = KEPT) -> "ScoreSketch":
        """Start with no row: merging it changes nothing. Raises ValueError where `columns` or `kept` is below 1."""
        if columns < 1 or kept < 1:
            raise ValueError(f"a sketch has at least one column and keeps at least one row, got {columns} and {kept}")
        none = torch.zeros(0, columns)
        return cls(columns, kept, 0, none, none, _no_middle(columns))

    def add(self, values: Float[Tensor, "n columns"]) -> "ScoreSketch":
        """Take in rows, as float32 (which keeps the order of wider types); ±infinity is a value like any other.

        Raises:
            ValueError: NaN, which has no rank, or another number of columns. Nothing is then taken in.
        """
        rows = values.detach().to("cpu", torch.float32).contiguous()
        if rows.shape[1] != self.columns:
            raise ValueError(f"{rows.shape[1]} columns for a sketch of {self.columns}")
        _refuse_nan(rows)
        if len(rows):
            self.middle.update(rows.numpy())
            self._take_in(len(rows), rows, rows)
        return self

    def merge(self, other: "ScoreSketch") -> "ScoreSketch":
        """Take in what another sketch saw. Raises ValueError for itself, or where `columns` or `kept` differ."""
        if (other.columns, other.kept) != (self.columns, self.kept):
            raise ValueError(
                f"cannot merge {other.columns} columns, {other.kept} kept, into {self.columns} columns, {self.kept} kept"
            )
        if other is self:
            raise ValueError("a sketch merged with itself would count every row twice")
        self.middle.merge(other.middle)
        self._take_in(other.n, other.high_tail, other.low_tail)
        return self

    def _take_in(self, n: int, high: Float32[Tensor, "n columns"], low: Float32[Tensor, "n columns"]) -> None:
        self.n += n
        rows = min(self.n, self.kept)
        self.high_tail = torch.cat([self.high_tail, high]).topk(rows, dim=0).values
        self.low_tail = torch.cat([self.low_tail, low]).topk(rows, dim=0, largest=False).values

    @property
    def high(self) -> Float32[Tensor, " columns"]:
        """Largest value so far; -infinity before the first row."""
        return self.high_tail[0] if self.n else torch.full((self.columns,), -math.inf)

    @property
    def low(self) -> Float32[Tensor, " columns"]:
        """Smallest value so far; infinity before the first row."""
        return self.low_tail[0] if self.n else torch.full((self.columns,), math.inf)

    def order_statistic(self, rank: int) -> Float32[Tensor, " columns"]:
        """The `rank`-th smallest value, from 1 to n: exact within `kept` of either end, else within `RANK_ERROR` · n ranks.

        Raises:
            ValueError: no such rank.
        """
        if not 1 <= rank <= self.n:
            raise ValueError(f"rank {rank} of {self.n} rows")
        if rank <= self.kept:
            return self.low_tail[rank - 1]
        if rank > self.n - self.kept:
            return self.high_tail[self.n - rank]
        estimate = torch.from_numpy(self.middle.get_quantiles(rank / self.n))[:, 0]
        return estimate.clamp(self.low_tail[-1], self.high_tail[-1])  # what the tails know for certain

    def quantile(self, q: float) -> Float32[Tensor, " columns"]:
        """The smallest value that at least a share `q` of the rows does not exceed; a value that was seen, no mean of two.

        Exact where its rank lies in a tail; in the middle its true rank may be `RANK_ERROR` · n away.

        Raises:
            NotTestable: there is no row yet.
            ValueError: `q` outside 0..1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must lie in 0..1, got {q}")
        if not self.n:
            raise NotTestable("No row was taken in yet: there is no quantile. Calibrate on clean traffic first.")
        return self.order_statistic(max(1, math.ceil(Fraction(str(q)) * self.n)))  # q as written, not as rounded

    def at_least(self, values: Float[Tensor, " columns"]) -> Int[Tensor, " columns"]:
        """How many rows are >= `values`, per column.

        Exact where the value lies above the least of the high tail or not above the greatest of the low tail; else
        within `RANK_ERROR` · n, one query a column (some 25 µs), and never a count that a tail rules out.

        Raises:
            ValueError: NaN, or another number of columns.
        """
        wanted = values.detach().to("cpu", torch.float32)
        if len(wanted) != self.columns:
            raise ValueError(f"{len(wanted)} values for a sketch of {self.columns} columns")
        _refuse_nan(wanted)
        from_above = (self.high_tail >= wanted).sum(0)
        from_below = self.n - (self.low_tail < wanted).sum(0)
        rows = min(self.n, self.kept)
        exact = torch.where(from_above < rows, from_above, from_below)  # a full tail may have lost ties
        unsure = ((from_above == rows) & (from_below == self.n - rows)).nonzero().flatten()
        if self.n > rows and len(unsure):
            just_below = wanted[unsure].nextafter(torch.tensor(-math.inf)).tolist()
            share = [self.middle.get_ranks(v, i)[0, 0] for v, i in zip(just_below, unsure.tolist(), strict=True)]
            estimate = self.n - (torch.tensor(share, dtype=torch.float64) * self.n).round().long()
            exact[unsure] = estimate.clamp(rows, self.n - rows)
        return exact

    def to_bytes(self) -> bytes:
        """A safetensors file, schema version and checksum in its metadata. Law: `from_bytes` of it answers alike."""
        tensors = {
            "counts": torch.tensor([self.n, self.kept]),
            "high": self.high_tail.contiguous(),
            "low": self.low_tail.contiguous(),
        }
        if self.n > self.kept:  # before that the tails hold every row
            # All columns saw equally many rows, so that their sketches are equally long.
            middle = np.stack([np.frombuffer(column, np.uint8) for column in self.middle.serialize()])
            tensors["middle"] = torch.from_numpy(middle)
        return save(tensors, {METADATA: f"{SCHEMA} {_checksum(tensors)}"})  # one key: equal states, equal bytes

    @classmethod
    def from_bytes(cls, data: bytes) -> "ScoreSketch":
        """The sketch that `to_bytes` wrote.

        Raises:
            InvalidInput: the bytes are cut, altered, of a later schema, or no sketch at all.
        """
        tensors = _opened(data)
        n, kept, high, low, middle = _checked(tensors)
        sketch = cls.empty(high.shape[1], kept)
        sketch.n, sketch.high_tail, sketch.low_tail = n, high, low
        if middle is None:
            sketch.middle.update(low.numpy())
        else:
            for column, row in enumerate(middle):
                sketch.middle.deserialize(row.numpy().tobytes(), column)
        return sketch


def _no_middle(columns: int) -> Any:
    return cast(Any, datasketches).vector_of_kll_floats_sketches(KLL_K, columns)


def _refuse_nan(values: Tensor) -> None:
    if values.isnan().any():
        raise ValueError("NaN among the scores: it has no rank")


def _broken(what: str) -> InvalidInput:
    return InvalidInput(
        f"This is no sketch of scores: {printable(what, 200)}.\nGive an older state, or calibrate again."
    )


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _opened(data: bytes) -> dict[str, Tensor]:
    """The tensors of a whole and unaltered sketch; safetensors gives the metadata of files on disk alone."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError):
        raise _broken("the bytes are no whole safetensors file") from None
    schema, _, checksum = header.get("__metadata__", {}).get(METADATA, "unknown").partition(" ")
    if schema != str(SCHEMA):
        raise _broken(f"its schema is {schema}, and this version reads {SCHEMA}")
    kinds = {name: (tensor.dtype, tensor.ndim) for name, tensor in tensors.items()}
    if kinds not in (KINDS, {name: kind for name, kind in KINDS.items() if name != "middle"}):
        raise _broken(f"its tensors {', '.join(sorted(tensors))} are not those of a sketch")
    if checksum != _checksum(tensors):
        raise _broken("its checksum is wrong: the bytes were altered")
    return tensors


def _checked(tensors: dict[str, Tensor]) -> tuple[int, int, Tensor, Tensor, Tensor | None]:
    """n, kept, both tails and the middle, once they can be true together: anybody can write a right checksum."""
    counts, high, low, middle = tensors["counts"], tensors["high"], tensors["low"], tensors.get("middle")
    if len(counts) != 2 or counts[0] < 0 or counts[1] < 1:
        raise _broken(f"its counts are {counts.tolist()}")
    n, kept = (int(count) for count in counts)
    if high.shape != low.shape or len(high) != min(n, kept) or high.shape[1] < 1:
        raise _broken(f"its tails are {list(high.shape)} and {list(low.shape)} with {kept} kept of {n} rows")
    ordered = (high[1:] <= high[:-1]).all() and (low[1:] >= low[:-1]).all()
    if high.isnan().any() or low.isnan().any() or not ordered:
        raise _broken("a tail is out of order")
    if (middle is not None) != (n > kept):
        raise _broken("its middle is missing, or there should be none")
    if middle is not None:
        _check_middle(middle, n, low[0], high[0])
    return n, kept, high, low, middle


def _check_middle(
    middle: UInt8[Tensor, "_ size"], n: int, low: Float32[Tensor, " columns"], high: Float32[Tensor, " columns"]
) -> None:
    """Refuse what would crash the process: DataSketches 5.2 trusts the level offsets that it deserialises.

    Layout of a KLL sketch of more than one float: header, level offsets, min, max, items from the first offset on. All
    columns have the same header, but for the flag that says whether level 0 happens to be sorted.
    """
    if len(middle) != len(low) or middle.shape[1] < KLL_HEADER.size:
        raise _broken("its middle is cut")
    flags = middle[:, 3]
    if ((flags != 0) & (flags != 2)).any():
        raise _broken("a sketch of its middle has unknown flags")
    *kind, _, k, m, rows, min_k, levels = KLL_HEADER.unpack(middle[0, : KLL_HEADER.size].numpy().tobytes())
    if (kind, k, m, rows, min_k) != ([5, 1, 15], KLL_K, 8, n, KLL_K) or not 1 <= levels <= MAX_LEVELS:
        raise _broken("a sketch of its middle is of another kind, or of another number of rows")
    values = KLL_HEADER.size + 4 * levels
    head = torch.cat([middle[:, :3], middle[:, 4:values]], dim=1)
    if middle.shape[1] < values or (head != head[0]).any():
        raise _broken("the sketches of its middle differ in shape")
    capacity = sum(max(m, ((2 * k << depth) // 3**depth + 1) >> 1) for depth in range(levels))
    offsets = [*struct.unpack(f"<{levels}I", middle[0, KLL_HEADER.size : values].numpy().tobytes()), capacity]
    sizes = np.diff(offsets)
    if (sizes < 0).any() or middle.shape[1] != values + 8 + 4 * (capacity - offsets[0]):
        raise _broken("a sketch of its middle has impossible levels")
    if sum(int(size) << level for level, size in enumerate(sizes)) != n:
        raise _broken("the levels of its middle do not add up to its rows")
    numbers = torch.from_numpy(middle[:, values:].contiguous().numpy().view(np.float32))  # min, max, items
    if not (torch.equal(numbers[:, 0], low) and torch.equal(numbers[:, 1], high)):
        raise _broken("its middle and its tails disagree on the range")
    if not ((numbers >= low[:, None]) & (numbers <= high[:, None])).all():
        raise _broken("its middle holds NaN, or a value out of range")
