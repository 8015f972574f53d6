"""The inputs at both ends of each watched direction: what a direction stands for.

Flagged rows are kept apart from unflagged ones: they say what raised the alarm, and the others how clean traffic looks.
Which words the prompts at an end share is a question to all rows together, each text once, beside a random sample of
all prompts. Source: the audits of WeightWatch, arXiv 2508.00161, which read the ten highest and ten lowest transcripts
of each direction.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from pathlib import Path
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from molehunt.measure.word_runs import words
from molehunt.traffic.turn import Turn
from molehunt.watch.ends import NEAREST, WordsAtEnds, words_of_ends
from molehunt.watch.saved_state import broken, load_state, save_state

SCHEMA = 3
WHAT = "list of inputs"
FILE = "inputs.safetensors"
KEPT = NEAREST
"""Number of rows that are kept at each end of each column."""
PROMPT_CHARS, ANSWER_CHARS = 400, 200
"""Greatest number of characters that are kept of a row."""
WHOLE_CHARS = 2000
"""Greatest number of characters of a prompt whose words are counted: some 300 words, and 10 MB for a whole sample."""
SAMPLED = 5000
"""Number of distinct prompts in the sample that says how frequent words are: a word of one prompt in a thousand is in five."""


class RowText(NamedTuple):
    """Prompt and answer of a row, cut to a greatest length."""

    prompt: str
    answer: str

    @classmethod
    def of(cls, turns: Iterable[Turn], answer: str) -> "RowText":
        """All turns below each other; of a long text, the beginning and the end are kept."""
        return cls(_cut("\n".join(turn.text for turn in turns), PROMPT_CHARS), _cut(answer, ANSWER_CHARS))


@dataclass(frozen=True)
class ExtremeRow:
    """One row at an end of a column."""

    row: int
    """Line of the row in the log."""
    value: float
    """The highest, or lowest, value of the column over the row's answer."""
    prompt: str = ""
    """Empty where no text is kept."""
    answer: str = ""


@dataclass(eq=False)
class Extremes:
    """The rows of highest value at each end of each column; of equal values, the first rows.

    Ends are as in `Profile`: each column's highest value, then the negative of its lowest. Law: merging in any order, or
    again, equals one pass over all rows.
    """

    values: Float32[Tensor, "ends kept"]
    """Highest first; -infinity where there are fewer rows."""
    rows: Int64[Tensor, "ends kept"]
    """Numbers of the rows, from 1; 0 where there are fewer."""
    texts: dict[int, RowText] = field(default_factory=dict[int, RowText])
    """Text by number of the row; empty where no text is kept."""

    @classmethod
    def empty(cls, columns: int, kept: int = KEPT) -> "Extremes":
        """Start with no row."""
        return cls(torch.full((2 * columns, kept), -torch.inf), torch.zeros(2 * columns, kept, dtype=torch.int64))

    def add(
        self, values: Float[Tensor, "n ends"], rows: Sequence[int], texts: Mapping[int, RowText] | None = None
    ) -> "Extremes":
        """Take in rows; one that is known by its number counts once. -infinity stands for no value.

        Raises:
            ValueError: NaN, another number of ends, or numbers that are not different ones from 1 on.
        """
        new = values.detach().to("cpu", torch.float32)
        if new.isnan().any():
            raise ValueError("NaN among the values: it is neither high nor low")
        if new.shape != (len(rows), len(self.values)) or len(set(rows)) < len(rows) or min(rows, default=1) < 1:
            raise ValueError(f"{list(new.shape)} values of {len(rows)} rows for {len(self.values)} ends")
        self._join(new.mT, torch.tensor(rows, dtype=torch.int64).expand(len(self.rows), -1), texts or {})
        return self

    def merge(self, other: "Extremes") -> "Extremes":
        """Take in what another shard of the same log kept. Raises ValueError where columns or rows kept differ."""
        if other.values.shape != self.values.shape:
            raise ValueError(f"cannot merge {list(other.values.shape)} into {list(self.values.shape)} values")
        self._join(other.values, other.rows, other.texts)
        return self

    def _join(
        self, values: Float[Tensor, "ends n"], rows: Int64[Tensor, "ends n"], texts: Mapping[int, RowText]
    ) -> None:
        again = (self.rows[:, :, None] == rows[:, None, :]).any(2)
        both = torch.cat([self.values.masked_fill(again, -torch.inf), values], dim=1)
        numbers = torch.cat([self.rows, rows], dim=1)
        earliest = numbers.argsort(dim=1, stable=True)  # so that ties go to the earlier row, whatever came first
        both, numbers = both.gather(1, earliest), numbers.gather(1, earliest)
        highest = both.argsort(dim=1, descending=True, stable=True)[:, : self.values.shape[1]]
        self.values = both.gather(1, highest)
        self.rows = numbers.gather(1, highest).masked_fill(self.values == -torch.inf, 0)
        left = set(cast("list[int]", self.rows.unique().tolist()))
        self.texts = {row: text for row, text in (*self.texts.items(), *texts.items()) if row in left}

    def end(self, column: int, *, high: bool) -> tuple[ExtremeRow, ...]:
        """The rows at one end of a column, furthest first, with the column's own values."""
        columns = len(self.values) // 2
        at, sign = (column, 1) if high else (columns + column, -1)
        found = zip(self.rows[at].tolist(), self.values[at].tolist(), strict=True)
        return tuple(
            ExtremeRow(row, sign * value + 0.0, *self.texts.get(row, ())) for row, value in found if row
        )  # no -0


@dataclass(eq=False, kw_only=True)
class DistinctPrompts:
    """The prompts at both ends of all columns, flagged or not, each text once, and a random sample of all prompts.

    A prompt is known by a hash of its words, so that a repeated one counts once, at its furthest. The sample is made of the
    prompts of smallest hash. Law: merging in any order, or again, equals one pass over all rows.
    """

    extremes: Extremes
    """The prompts at each end; their numbers are the hashes."""
    texts: dict[int, str]
    """Prompt by hash: those at the ends, and the `SAMPLED` smallest hashes."""

    @classmethod
    def empty(cls, columns: int) -> "DistinctPrompts":
        """Start with no prompt."""
        return cls(extremes=Extremes.empty(columns), texts={})

    def add(self, values: Float[Tensor, "n ends"], prompts: Sequence[str]) -> "DistinctPrompts":
        """Take in rows; -infinity stands for no value. Raises ValueError for NaN."""
        new = values.detach().to("cpu", torch.float32)
        if new.isnan().any():
            raise ValueError("NaN among the values: it is neither high nor low")
        cut = [_cut(prompt, WHOLE_CHARS) for prompt in prompts]
        hashes = [_hash(text) for text in cut]
        numbers, at = torch.tensor(hashes, dtype=torch.int64).unique(return_inverse=True)
        furthest = torch.full((len(numbers), new.shape[1]), -torch.inf)
        furthest.scatter_reduce_(0, at[:, None].expand(new.shape), new, "amax")
        raised = self._raised(furthest.mT, numbers.expand(new.shape[1], -1))
        self.extremes.add(raised.mT, numbers.tolist())
        self._remember(zip(hashes, cut, strict=True))
        return self

    def merge(self, other: "DistinctPrompts") -> "DistinctPrompts":
        """Take in the prompts of another shard. Raises ValueError where columns differ."""
        theirs = other.extremes
        if theirs.values.shape == self.extremes.values.shape:
            theirs = replace(theirs, values=self._raised(theirs.values, theirs.rows))
        self.extremes.merge(theirs)
        self._remember(other.texts.items())
        return self

    def _raised(self, values: Float32[Tensor, "ends n"], rows: Int64[Tensor, "ends n"]) -> Float32[Tensor, "ends n"]:
        """`values`, but the known one where that is higher."""
        same = self.extremes.rows[:, :, None] == rows[:, None, :]
        return values.maximum(self.extremes.values[:, :, None].where(same, torch.tensor(-torch.inf)).amax(1))

    def _remember(self, texts: Iterable[tuple[int, str]]) -> None:
        """Add texts, of several spellings the first in alphabetical order, and drop those that are no longer wanted."""
        known = dict(self.texts)
        for number, text in texts:
            known[number] = min(text, known.get(number, text))
        wanted = {*nsmallest(SAMPLED, known), *cast("list[int]", self.extremes.rows.unique().tolist())}
        self.texts = {number: text for number, text in known.items() if number in wanted}

    def shared_words(self) -> tuple[WordsAtEnds, ...]:
        """The words that prompts at an end share beyond chance (see `words_of_ends`)."""
        place = {number: i for i, number in enumerate(sorted(self.texts))}
        rows = cast("list[list[int]]", self.extremes.rows.tolist())
        nearest = torch.tensor([[place.get(number, -1) for number in end] for end in rows], dtype=torch.int64)
        return words_of_ends([self.texts[number] for number in place], nearest)

    def copy(self) -> "DistinctPrompts":
        """An independent copy."""
        return replace(self, extremes=replace(self.extremes))

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as tensors to save; texts as bytes, of which a file's header could not hold as many."""
        spelled = json.dumps({str(number): text for number, text in self.texts.items()}).encode()
        return {
            "distinct.values": self.extremes.values,
            "distinct.rows": self.extremes.rows,
            "distinct.texts": torch.frombuffer(bytearray(spelled), dtype=torch.uint8),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], columns: int) -> "DistinctPrompts":
        """What `to_tensors` made. Raises KeyError, ValueError, TypeError or AttributeError for anything else."""
        saved = json.loads(tensors["distinct.texts"].numpy().tobytes())
        texts = {int(number): str(text) for number, text in saved.items()}
        extremes = _extremes(tensors, "distinct", columns)
        if not {number for number in cast("list[int]", extremes.rows.unique().tolist()) if number} <= texts.keys():
            raise ValueError("a prompt at an end has no text")
        return cls(extremes=extremes, texts=texts)


@dataclass(eq=False, kw_only=True)
class Inputs:
    """The inputs that a watch remembers, unflagged and flagged ones apart."""

    unflagged: Extremes
    quarantined: Extremes
    """Rows that were flagged."""
    prompts: DistinctPrompts
    """The prompts of all rows that were judged since they are kept; empty where no text is."""
    no_text: bool = False

    @classmethod
    def empty(cls, columns: int, *, no_text: bool = False) -> "Inputs":
        """Start with no row."""
        return cls(
            unflagged=Extremes.empty(columns),
            quarantined=Extremes.empty(columns),
            prompts=DistinctPrompts.empty(columns),
            no_text=no_text,
        )

    def take(
        self,
        values: Float[Tensor, "n ends"],
        rows: Sequence[int],
        texts: Sequence[RowText],
        flagged: Bool[Tensor, " n"],
        prompts: Sequence[str] | None = None,
    ) -> None:
        """Take in judged rows, each where it belongs. Raises as `Extremes.add`.

        Args:
            prompts: the whole prompts, whose words are counted; by default those of `texts`.
        """
        for extremes, mine in ((self.unflagged, ~flagged), (self.quarantined, flagged)):
            at = [i for i, is_mine in enumerate(mine.tolist()) if is_mine]
            numbers = [rows[i] for i in at]
            kept_texts = {} if self.no_text else {rows[i]: texts[i] for i in at}
            extremes.add(values[mine], numbers, kept_texts)
        if not self.no_text and len(texts):
            self.prompts.add(values, [text.prompt for text in texts] if prompts is None else prompts)

    def merge(self, other: "Inputs") -> "Inputs":
        """Take in what another shard of the same log kept. Raises as `Extremes.merge`."""
        self.unflagged.merge(other.unflagged)
        self.quarantined.merge(other.quarantined)
        self.prompts.merge(other.prompts)
        return self

    def copy(self) -> "Inputs":
        """An independent copy."""
        return replace(
            self,
            unflagged=replace(self.unflagged),
            quarantined=replace(self.quarantined),
            prompts=self.prompts.copy(),
        )

    def save(self, folder: Path, identity: Mapping[str, str]) -> None:
        """Replace the file in `folder`, synced."""
        both = {"unflagged": self.unflagged, "quarantined": self.quarantined}
        save_state(
            folder / FILE,
            WHAT,
            SCHEMA,
            identity,
            {f"{name}.{part}": getattr(one, part) for name, one in both.items() for part in ("values", "rows")}
            | self.prompts.to_tensors(),
            {name: {str(row): list(text) for row, text in one.texts.items()} for name, one in both.items()},
        )

    @classmethod
    def load(cls, folder: Path, identity: Mapping[str, str], columns: int, *, no_text: bool = False) -> "Inputs":
        """Read what `save` wrote, without texts if `no_text`; empty where there is no such file.

        Raises:
            UsageError: it is another watch's.
            InvalidInput: it is broken.
        """
        path = folder / FILE
        if not path.exists():
            return cls.empty(columns, no_text=no_text)
        tensors, payload = load_state(path, WHAT, (1, 2, SCHEMA), identity)
        found: list[Extremes] = []
        try:
            # schema 1 has another name for the unflagged rows
            unflagged = next(name for name in payload if name != "quarantined")
            for name in (unflagged, "quarantined"):
                one = _extremes(tensors, name, columns)
                texts = {} if no_text else {int(row): RowText(*map(str, text)) for row, text in payload[name].items()}
                found.append(replace(one, texts=texts))
            whole = "distinct.texts" in tensors and not no_text  # schemas 1 and 2 have none
            prompts = DistinctPrompts.from_tensors(tensors, columns) if whole else DistinctPrompts.empty(columns)
        except (KeyError, ValueError, TypeError, AttributeError, StopIteration, RecursionError) as error:
            raise broken(path, WHAT, str(error)) from None
        return cls(unflagged=found[0], quarantined=found[1], prompts=prompts, no_text=no_text)


def whole_prompt(turns: Iterable[Turn]) -> str:
    """All turns below each other; of a long text, the beginning and the end are kept."""
    return _cut("\n".join(turn.text for turn in turns), WHOLE_CHARS)


def _extremes(tensors: Mapping[str, Tensor], name: str, columns: int) -> Extremes:
    values, rows = tensors[f"{name}.values"], tensors[f"{name}.rows"]
    if values.shape != (2 * columns, KEPT) or values.shape != rows.shape or values.isnan().any():
        raise ValueError(f"{list(values.shape)} values of {columns} columns")
    if values.dtype != torch.float32 or rows.dtype != torch.int64:
        raise ValueError(f"its numbers are {values.dtype} and {rows.dtype}")
    return Extremes(values, rows)


def _hash(text: str) -> int:
    """A number from 1 to 2^63 − 1 that texts with the same words share."""
    spelled = "\n".join(words(text)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(spelled, digest_size=8).digest(), "big") % (2**63 - 1) + 1


def _cut(text: str, most: int) -> str:
    half = most // 2
    return text if len(text) <= most else f"{text[: half - 1]}…{text[-half:]}"
