"""The profile of an answer along the watched directions: the extremes of every column, as the answer grows.

Extremes grow with length, so an answer is read at prefix checkpoints: after 1, 2, 4, 8, … tokens and at its end. Each
checkpoint is compared with clean answers of that length. Position 0 of an answer is the decision: the last prompt token, whose output
is the first token of the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor


def prefix_index(n: int) -> int:
    """Index j of the checkpoint that judges an answer of `n` tokens: the first with 2^j ≥ n. Raises ValueError for n < 1."""
    if n < 1:
        raise ValueError("an answer without tokens has no prefix")
    return (n - 1).bit_length()


@dataclass(frozen=True, eq=False)
class Profile:
    """The extremes of one answer. Columns are doubled: each column's highest value, then the negative of its lowest."""

    prefixes: Float[Tensor, "prefixes twice_columns"]
    """Row j holds the extremes over the answer's first 2^j tokens, or over all where there are fewer."""
    peaks: Int[Tensor, " twice_columns"]
    """Token of the answer at which each extreme of the last row lies."""
    tokens: int
    prompt: Float[Tensor, " features"] = field(default_factory=lambda: torch.empty(0))
    """Features of the prompt (see `strata.prompt_features`). Without any, all prompts are in one stratum."""

    def __post_init__(self) -> None:
        if len(self.prefixes) != prefix_index(self.tokens) + 1:
            raise ValueError(f"an answer of {self.tokens} tokens has {prefix_index(self.tokens) + 1} prefixes")


def profiles(
    columns: Float[Tensor, "batch pos columns"], tokens: Sequence[int], prompts: Float[Tensor, "batch features"]
) -> list[Profile]:
    """Profiles of teacher-forced answers, on the CPU: the same as from `RunningProfile`, without a step for each row.

    Args:
        columns: scores of every answer token; a row shorter than the longest repeats its last one.
        tokens: number of tokens of each answer.
        prompts: features of each row's prompt.

    Raises:
        ValueError: an answer without tokens, or NaN among its columns.
    """
    if min(tokens) < 1:
        raise ValueError("an answer without tokens has no profile")
    highest = columns[:, 0]
    lowest = highest
    prefixes = [torch.cat([highest, -lowest], dim=1)]
    start = 1
    while start < columns.shape[1]:
        newest = columns[:, start : 2 * start]
        highest, lowest = highest.maximum(newest.amax(1)), lowest.minimum(newest.amin(1))
        prefixes.append(torch.cat([highest, -lowest], dim=1))
        start *= 2
    all_prefixes = torch.stack(prefixes, dim=1).cpu()
    peaks = torch.cat([_first(columns, highest), _first(columns, lowest)], dim=1).cpu()
    if all_prefixes[:, -1].isnan().any():  # once there, it stays
        raise ValueError("NaN among the activations: this answer cannot be scored")
    return [
        Profile(prefixes=all_prefixes[i, : prefix_index(n) + 1], peaks=at, tokens=n, prompt=prompts[i])
        for i, (n, at) in enumerate(zip(tokens, peaks, strict=True))
    ]


def _first(
    columns: Float[Tensor, "batch pos columns"], wanted: Float[Tensor, "batch columns"]
) -> Int[Tensor, "batch columns"]:
    """The first position that holds the wanted value; faster than torch's own argmax along a middle dimension."""
    n = columns.shape[1]
    countdown = torch.arange(n, 0, -1, dtype=torch.int32, device=columns.device)[:, None]
    return n - ((columns == wanted[:, None]) * countdown).amax(1).long()


class RunningProfile:
    """Extremes of a batch of answers while they are generated. Values stay on the device until `profile`."""

    def __init__(
        self, prompts: Float[Tensor, "batch features"], columns: int, device: torch.device | str = "cpu"
    ) -> None:
        batch = len(prompts)
        shape = (batch, 2 * columns)
        self.prompts = prompts
        """Features of each row's prompt; they stay on the CPU."""
        self.extremes: Float[Tensor, "batch twice_columns"] = torch.full(shape, -torch.inf, device=device)
        """Extremes of each answer so far."""
        self.tokens = [0] * batch
        """Number of answer tokens seen of each row."""
        self._peaks = torch.zeros(shape, dtype=torch.long, device=device)
        self._prefixes: list[list[Tensor]] = [[] for _ in range(batch)]

    def extend(self, columns: Float[Tensor, "batch pos columns"]) -> None:
        """Take the next tokens of every row: one in cached decoding, many in a teacher-forced pass.

        NaN is kept: `profile` raises for a row with a token that could not be scored.
        """
        both = torch.cat([columns, -columns], dim=-1)
        start = 0
        while start < both.shape[1]:  # up to the next checkpoint of any row, at 2^j tokens
            to_prefix = min((1 << prefix_index(seen + 1)) - seen for seen in self.tokens)
            stop = min(both.shape[1], start + to_prefix)
            self._advance(both[:, start:stop])
            start = stop

    def _advance(self, both: Tensor) -> None:
        highest, at = both.max(dim=1) if both.shape[1] > 1 else (both[:, 0], 0)
        seen = torch.tensor(self.tokens, device=both.device)[:, None] if len(set(self.tokens)) > 1 else self.tokens[0]
        self._peaks = torch.where(highest > self.extremes, at + seen, self._peaks)
        self.extremes = self.extremes.maximum(highest)
        for row in range(len(self.tokens)):
            self.tokens[row] += both.shape[1]
            if self.tokens[row] == 1 << prefix_index(self.tokens[row]):
                self._prefixes[row].append(self.extremes[row].clone())

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows alone: the others have ended."""
        self.extremes, self._peaks = self.extremes[rows], self._peaks[rows]
        self._prefixes = [self._prefixes[row] for row in rows.tolist()]
        self.tokens = [self.tokens[row] for row in rows.tolist()]
        self.prompts = self.prompts[rows.cpu()]

    def join(self, others: "RunningProfile") -> None:
        """Go on with these answers, too, behind those of this batch."""
        self.extremes = torch.cat([self.extremes, others.extremes])
        self._peaks = torch.cat([self._peaks, others._peaks])
        self._prefixes += others._prefixes
        self.tokens += others.tokens
        self.prompts = torch.cat([self.prompts, others.prompts])

    def profile(self, row: int) -> Profile:
        """The answer so far. Raises ValueError for NaN: such a token was not scored."""
        prefixes = list(self._prefixes[row])
        if self.tokens[row] != 1 << prefix_index(self.tokens[row]):
            prefixes.append(self.extremes[row])
        stacked = torch.stack(prefixes).cpu()
        if stacked.isnan().any():
            raise ValueError("NaN among the activations: this answer cannot be scored")
        return Profile(
            prefixes=stacked, peaks=self._peaks[row].cpu(), tokens=self.tokens[row], prompt=self.prompts[row]
        )
