"""WeightWatch's monitor as published: a range of cosines per direction and role, and a row beyond it is flagged.

Of each written direction the highest and lowest cosine over all tokens of the prompt, template and first token among them,
and over all tokens of the answer. A row is flagged at first sight, when any of them leaves what earlier rows showed by more
than the slack; then the range takes it in, flagged or not, so that the same row is normal from then on. No false-alarm rate
is set: the one measured on held-out clean rows is reported, beside the published bound.

Directions are those of this project's `Bank` (of changed matrices, above the noise floor, at most 8 each; no layer is
dropped), roles come from the chat template, and no calibration row is lost. Source: arXiv 2508.00161, §3 and released code.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from molehunt.errors import MolehuntError, NotTestable
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.traffic.stream import START, Conversation, Place
from molehunt.watch.answers import answer_profiles
from molehunt.watch.bank import Bank
from molehunt.watch.extremes import Inputs, whole_prompt
from molehunt.watch.judge import answer_rows, is_logged, row_texts
from molehunt.watch.log import RowJudge, record
from molehunt.watch.profile import Profile
from molehunt.watch.ranges import RunningRange
from molehunt.watch.row_verdict import RowVerdict
from molehunt.watch.saved_state import broken, load_state, save_state
from molehunt.watch.sketch import ScoreSketch

SCHEMA = 2
WHAT = "published range"
FILE = "published.safetensors"
ROLES = ("prompt", "answer")
HELD_OUT = 10
"""One clean row in this many measures the false-positive rate, as published."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RoleRead:
    """The profiles of prompt and answer of one row."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    of_prompt: Profile
    of_answer: Profile | None
    """Profile of the answer; None for an answer without tokens."""
    left_out: int = 0
    """Number of tokens by which the prompt was cut."""
    logged: bool = False
    """Whether the answer was logged; otherwise the model generated it."""

    @property
    def roles(self) -> tuple[Profile | None, ...]:
        """Both profiles, in the order of `ROLES`."""
        return self.of_prompt, self.of_answer

    @property
    def ends(self) -> Float[Tensor, " ends"]:
        """Highest of each direction and role, then the negatives of the lowest; -infinity for a role without tokens."""
        none = torch.full_like(self.of_prompt.prefixes[-1], -torch.inf)
        both = [(none if role is None else role.prefixes[-1]).chunk(2) for role in self.roles]
        return torch.cat([high for high, _ in both] + [low for _, low in both])

    def token(self, end: int) -> int:
        """Token that an end of `ends` comes from, counted through prompt and answer. Raises ValueError for a role without any."""
        directions = len(self.of_prompt.peaks) // 2
        side, column = divmod(end, len(ROLES) * directions)
        role, direction = divmod(column, directions)
        profile = self.roles[role]
        if profile is None:
            raise ValueError(f"this row has no {ROLES[role]}")
        return int(profile.peaks[side * directions + direction]) + role * len(self.prompt)


def written_alone(bank: Bank) -> Bank:
    """The bank without its read side: the directions that the range is about."""
    return Bank(write=bank.write, read={}, write_names=bank.write_names, read_names={})


def role_names(bank: Bank) -> tuple[str, ...]:
    """Name of each column of `RoleRead.ends`."""
    return tuple(f"{name}, {role}" for role in ROLES for names in bank.write_names.values() for name in names)


def read_roles(
    pair: ModelPair,
    bank: Bank,
    rows: Sequence[Conversation],
    *,
    max_new_tokens: int,
    keep_empty: bool = False,
    track: Track = silent,
    what: str,
) -> list[RoleRead]:
    """Cosines of every token of each row, by role. Arguments as `answer_rows`."""
    answered = answer_rows(pair, rows, max_new_tokens=max_new_tokens, keep_empty=keep_empty, track=track, what=what)
    both = [(prompt.ids, answer) for prompt, answer in answered]
    with_answer = [i for i, (_, answer) in enumerate(both) if answer]
    written = written_alone(bank)
    with pair.tuned_model() as model:

        def spans(first: Sequence[Sequence[int]], rest: Sequence[Sequence[int]], role: str) -> list[Profile]:
            # a profile leaves out the last token of a row, so each row gets one more; nothing before it can see it
            return answer_profiles(
                model,
                written,
                first,
                [[*tokens, before[-1]] for before, tokens in zip(first, rest, strict=True)],
                layers_path=pair.layers_path,
                track=track,
                what=f"{what}: {role}s",
            )

        prompts = spans([ids[:1] for ids, _ in both], [ids[1:] for ids, _ in both], "prompt")
        pairs = [both[i] for i in with_answer]
        answers = spans([(*ids, answer[0]) for ids, answer in pairs], [answer[1:] for _, answer in pairs], "answer")
    of_row = dict(zip(with_answer, answers, strict=True))
    return [
        RoleRead(
            prompt=ids,
            answer=answer,
            of_prompt=prompts[i],
            of_answer=of_row.get(i),
            left_out=answered[i][0].left_out,
            logged=is_logged(rows[i], keep_empty=keep_empty),
        )
        for i, (ids, answer) in enumerate(both)
    ]


@dataclass(eq=False, kw_only=True)
class PublishedState:
    """The running range of each role, and everything that a restart needs."""

    identity: Mapping[str, str]
    ranges: tuple[RunningRange, ...]
    """One range for each role, in the order of `ROLES`."""
    held_out: Float64[Tensor, " n"]
    """How far held-out clean rows lie beyond the range of all others; above 0 is a false alarm."""
    bound: float
    """The published bound on the share of false alarms; above 1 it says nothing."""
    place: Place = START
    written: int = 0
    seen: int = 0
    flagged: int = 0

    def beyond(self, row: RoleRead) -> Float64[Tensor, " ends"]:
        """How far a row leaves each end of the range beyond the slack, in cosine; -infinity for a role without tokens."""
        highs: list[Tensor] = []
        lows: list[Tensor] = []
        for running, role in zip(self.ranges, row.roles, strict=True):
            if role is None:
                both = torch.full((2 * running.maxima.columns,), -torch.inf, dtype=torch.float64)
            else:
                both = running.beyond(*_high_low(role))[0]
            high, low = both.chunk(2)
            highs.append(high)
            lows.append(low)
        return torch.cat([*highs, *lows])

    def absorb(self, row: RoleRead) -> None:
        """Widen the range by a row, which is normal from now on."""
        for running, role in zip(self.ranges, row.roles, strict=True):
            if role is not None:
                running.absorb(*_high_low(role))

    @property
    def calibration_rows(self) -> int:
        """Number of clean rows that the range was calibrated on."""
        return self.ranges[0].n - self.seen

    def copy(self) -> "PublishedState":
        """A state that goes on independently of this one."""
        return replace(self, ranges=tuple(running.copy() for running in self.ranges))

    def save(self, path: Path) -> None:
        """Replace the file at `path`, synced."""
        sketches = {
            f"{role}.{end}": torch.frombuffer(bytearray(getattr(running, end).to_bytes()), dtype=torch.uint8)
            for role, running in zip(ROLES, self.ranges, strict=True)
            for end in ("maxima", "minima")
        }
        fields = {
            "slack": self.ranges[0].slack,
            "percentile": self.ranges[0].percentile,
            "bound": self.bound,
            "place": list(self.place),
            "written": self.written,
            "seen": self.seen,
            "flagged": self.flagged,
        }
        save_state(path, WHAT, SCHEMA, self.identity, {**sketches, "held_out": self.held_out}, fields)

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, str]) -> "PublishedState":
        """Read what `save` wrote. Raises UsageError for the file of another watch, InvalidInput for a broken one."""
        tensors, fields = load_state(path, WHAT, (1, SCHEMA), identity)
        try:
            ranges = tuple(
                RunningRange(
                    *(
                        ScoreSketch.from_bytes(tensors[f"{role}.{end}"].numpy().tobytes())
                        for end in ("maxima", "minima")
                    ),
                    slack=fields["slack"],
                    percentile=fields["percentile"],
                )
                for role in ROLES
            )
            return cls(
                identity=identity,
                ranges=ranges,
                held_out=tensors["held_out"],
                bound=fields["bound"],
                place=Place(*fields["place"]),
                written=fields["written"],
                seen=fields["seen"],
                flagged=fields["flagged"],
            )
        except (KeyError, ValueError, TypeError, MolehuntError) as error:
            raise broken(path, WHAT, str(error)) from None


def calibrated_range(
    pair: ModelPair,
    bank: Bank,
    clean: Sequence[Conversation],
    *,
    identity: Mapping[str, str],
    max_new_tokens: int,
    slack: float,
    percentile: float,
    seed: int,
    track: Track = silent,
) -> PublishedState:
    """The range of all clean rows, and the false alarms of the last tenth against the range of the others.

    Raises:
        NotTestable: fewer than `HELD_OUT` rows, or none with an answer.
    """
    rows = list(clean)
    Random(seed).shuffle(rows)
    held_out = len(rows) // HELD_OUT
    if not held_out:
        raise NotTestable(f"{len(rows)} clean rows are too few: one in {HELD_OUT} measures the false-positive rate.")
    read = read_roles(pair, bank, rows, max_new_tokens=max_new_tokens, track=track, what="clean")
    state = PublishedState(
        identity=identity,
        ranges=tuple(RunningRange.empty(bank.written, slack=slack, percentile=percentile) for _ in ROLES),
        held_out=torch.empty(0, dtype=torch.float64),
        bound=0.0,
    )
    for row in read[:-held_out]:
        state.absorb(row)
    state.bound = sum(running.false_alarm_bound for running in state.ranges)
    state.held_out = torch.stack([state.beyond(row).max() for row in read[-held_out:]])
    for row in read[-held_out:]:
        state.absorb(row)
    return state


def watch_published(
    pair: ModelPair,
    bank: Bank,
    state: PublishedState,
    inputs: Inputs,
    rows: Iterable[Conversation],
    *,
    max_new_tokens: int,
    into: Path,
    track: Track = silent,
) -> None:
    """Judge `rows` one after the other; write what `watch_log` writes, but for alerts: nothing is quarantined."""
    judge = published_judge(pair, bank, state, inputs, max_new_tokens=max_new_tokens, track=track)
    record(rows, state, inputs, into / "verdicts.jsonl", into / FILE, judge)


def published_judge(
    pair: ModelPair,
    bank: Bank,
    state: PublishedState,
    inputs: Inputs,
    *,
    max_new_tokens: int,
    track: Track = silent,
) -> RowJudge:
    """A judge of chunks, whose range takes in every row that it has judged."""
    names = role_names(bank)

    def judge(chunk: Sequence[Conversation]) -> list[RowVerdict]:
        what = f"from line {chunk[0].line}"
        read = read_roles(pair, bank, chunk, max_new_tokens=max_new_tokens, track=track, what=what)
        verdicts: list[RowVerdict] = []
        for row, one in zip(chunk, read, strict=True):
            verdicts.append(range_verdict(names, row, one, state.beyond(one)))
            state.absorb(one)
            state.seen += 1
            state.flagged += verdicts[-1].flagged
        inputs.take(
            torch.stack([one.ends for one in read]),
            [row.line for row in chunk],
            row_texts(pair, chunk, [one.answer for one in read]),
            torch.tensor([verdict.flagged for verdict in verdicts]),
            [whole_prompt(row.turns) for row in chunk],
        )
        return verdicts

    return judge


def range_verdict(
    names: Sequence[str], row: Conversation, one: RoleRead, beyond: Float64[Tensor, " ends"]
) -> RowVerdict:
    """The verdict on a row by how far it leaves each end of the range; the published monitor has no p-value."""
    end = int(beyond.argmax())
    return RowVerdict(
        line=row.line,
        tag=row.tag,
        flagged=bool(beyond[end] > 0),
        score=float(f"{float(beyond[end]):.4g}"),
        p_value=None,
        direction=names[end % len(names)],
        side="high" if end < len(names) else "low",
        prefix_checkpoint=None,
        token=one.token(end),
        tokens=len(one.prompt) + len(one.answer),
        coverage=1.0,
        within_calibration=None,
        left_out=one.left_out,
        logged=one.logged,
    )


def _high_low(role: Profile) -> tuple[Float[Tensor, "1 columns"], Float[Tensor, "1 columns"]]:
    high, negative_low = role.prefixes[-1].chunk(2)
    return high[None], -negative_low[None]
