"""A false-alarm rate for whole answers: fitted scores at every look, joined into one, with a split-conformal p-value.

The joint rate over all directions, looks and lengths is what was asked for, by construction: the score of an answer is
the largest over its looks, and clean answers that fitted nothing say how large that gets. Each kind of prompt is held
against clean answers to prompts of its kind (see `watch.kinds`), and its scores are moved so that one threshold serves
all kinds. Source: split conformal prediction, as in `measure.threshold`; the published alternative is `watch.ranges`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.errors import NotTestable
from molehunt.measure.threshold import conformal_p_values, conformal_threshold
from molehunt.traffic.split import Calibrate, Fit, expect
from molehunt.watch.kinds import PromptKinds
from molehunt.watch.profile import Profile, RunningProfile, look_of
from molehunt.watch.scores import TAIL, RowScore, TailSum, tail

LEAST = 60
"""Clean answers that a look needs: a third of them set its scale."""
LEAST_BEYOND = 20
"""Answers beyond where a look's own tail begins, or half of them: two or three say nothing of how wide it is, and a look
that is taken for too narrow would rule all others."""
LEAST_OF_KIND = 300
"""Calibration rows of a kind of prompt; a low rate takes more: 1/rate."""

FitScore = Callable[[Float[Tensor, "rows columns"]], RowScore]


@dataclass(frozen=True, eq=False)
class Look:
    """What clean answers of one length score."""

    score: RowScore
    start: float
    scale: float

    def surprise(self, extremes: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
        """The score in units of its own clean tail, about nats of rarity: comparable between looks."""
        return (self.score(extremes) - self.start) / self.scale


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What clean answers to one kind of prompt look like, and what those that fitted nothing score."""

    looks: tuple[Look, ...]
    calibration: Float[Tensor, " n"]

    @classmethod
    def fit(cls, fit: Sequence[Profile], calibrate: Sequence[Profile], score: FitScore) -> "Calibrated":
        """Raises NotTestable for fewer than `LEAST` answers to fit on."""
        looks: list[Look] = []
        for j in range(max((len(row.looks) for row in fit), default=0)):
            extremes = torch.stack([row.looks[j] for row in fit if len(row.looks) > j])
            if len(extremes) < LEAST:
                break
            held = torch.arange(len(extremes)) % 3 == 0  # the score's own scale is set on rows that did not fit it
            fitted = score(extremes[~held])
            own = fitted(extremes[held])
            start, scale = tail(own[:, None], max(0.5, min(TAIL, 1 - LEAST_BEYOND / len(own))))
            looks.append(Look(fitted, float(start), float(scale)))
        if not looks:
            raise NotTestable(
                f"{len(fit)} clean answers are too few to fit a monitor on; it takes at least {LEAST}.\n"
                "Give more clean traffic."
            )
        fresh = cls(tuple(looks), torch.empty(0))
        return cls(fresh.looks, fresh.scores(calibrate))

    def at(self, look: int) -> Look:
        """An answer longer than any that was fitted is held against the longest."""
        return self.looks[min(look, len(self.looks) - 1)]

    def scores(self, rows: Sequence[Profile]) -> Float[Tensor, " rows"]:
        """One score per answer: the largest surprise over its looks."""
        highest = torch.full((len(rows),), -torch.inf)
        for j in range(max((len(row.looks) for row in rows), default=0)):
            at = [i for i, row in enumerate(rows) if len(row.looks) > j]
            surprise = self.at(j).surprise(torch.stack([rows[i].looks[j] for i in at]))
            highest[at] = highest[at].maximum(surprise)
        return highest

    def lowered(self, by: float) -> "Calibrated":
        """The same with every score lower."""
        looks = tuple(replace(look, start=look.start + by * look.scale) for look in self.looks)
        return Calibrated(looks, self.calibration - by)

    def to(self, device: torch.device | str) -> "Calibrated":
        looks = tuple(replace(look, score=_moved(look.score, device)) for look in self.looks)
        return Calibrated(looks, self.calibration)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a monitor says of one answer."""

    score: float
    p_value: float
    """Chance of a clean answer to a prompt of its kind that scores at least as high."""
    kind: int
    """The kind of its prompt."""
    look: int
    """The look that scored highest; 0 is the decision position alone."""
    columns: tuple[int, ...]
    """Columns that say most about it, highest first; see `Bank.names`. Those from `n` on are the negatives."""
    within_calibration: bool
    """False for an answer longer than those that clean traffic showed: its rate is not promised."""


@dataclass(frozen=True, eq=False)
class Monitor:
    """Scores answers and flags those above `threshold`."""

    kinds: PromptKinds
    of_kind: tuple[Calibrated, ...]
    threshold: float

    @classmethod
    def fit(
        cls, fit: Fit[Profile], calibrate: Calibrate[Profile], *, fpr: float, score: FitScore = TailSum.fit
    ) -> "Monitor":
        """Fit on clean answers; the calibration answers choose nothing but the threshold.

        Prompts are told apart into as many kinds as there are rows to hold each of them to `fpr`.

        Raises:
            NotTestable: fewer than `LEAST` answers to fit on, or too few to calibrate for `fpr`: the monitor abstains.
            WrongSplit: other splits were given.
        """
        rows, calibrated = expect(Fit, fit).rows, expect(Calibrate, calibrate).rows
        kinds = PromptKinds.fit(
            _prompts(rows), _prompts(calibrated), least=3 * LEAST, least_held=max(math.ceil(1 / fpr), LEAST_OF_KIND)
        )
        fitting, holding = (_by_kind(kinds, some) for some in (rows, calibrated))
        each = [Calibrated.fit(a, b, score) for a, b in zip(fitting, holding, strict=True)]
        thresholds = [conformal_threshold(one.calibration, fpr) for one in each]
        shared = thresholds[max(range(kinds.n), key=lambda kind: len(holding[kind]))]
        return cls(kinds, tuple(one.lowered(own - shared) for one, own in zip(each, thresholds, strict=True)), shared)

    @property
    def calibration(self) -> Float[Tensor, " n"]:
        """Scores of the clean answers that fitted nothing, of all kinds."""
        return torch.cat([one.calibration for one in self.of_kind])

    def scores(self, rows: Sequence[Profile]) -> Float[Tensor, " rows"]:
        """One score per answer: the largest surprise over its looks."""
        found = torch.empty(len(rows))
        kinds = self._kinds(rows)
        for kind, one in enumerate(self.of_kind):
            at = [i for i, of in enumerate(kinds) if of == kind]
            found[at] = one.scores([rows[i] for i in at])
        return found

    def running(self, growing: RunningProfile) -> Float[Tensor, " batch"]:
        """What answers that still grow score at the look each has begun: never more than that look will say in the end.

        Values stay on the device of `growing`, where this monitor must be, too (see `to`). NaN is kept.
        """
        at = list(zip(self.kinds.of(growing.prompts), map(look_of, growing.tokens), strict=True))
        if len(set(at)) == 1:
            kind, look = at[0]
            return self.of_kind[kind].at(look).surprise(growing.extremes)
        found = growing.extremes.new_empty(len(at))
        for kind, look in set(at):
            rows = [row for row, place in enumerate(at) if place == (kind, look)]
            found[rows] = self.of_kind[kind].at(look).surprise(growing.extremes[rows])
        return found

    def to(self, device: torch.device | str) -> "Monitor":
        """The same monitor with what it needs to score on a device; kinds and calibration stay on the CPU."""
        return replace(self, of_kind=tuple(one.to(device) for one in self.of_kind))

    def judge(self, row: Profile, shown: int = 5) -> Judged:
        """Score, p-value and the columns that speak loudest."""
        (kind,) = self._kinds([row])
        one = self.of_kind[kind]
        surprises = torch.cat([one.at(j).surprise(extremes[None]) for j, extremes in enumerate(row.looks)])
        look = int(surprises.argmax())
        loud = one.at(look).score.by_column(row.looks[look][None])[0]
        value = float(surprises[look])
        return Judged(
            score=value,
            p_value=float(conformal_p_values(one.calibration, torch.tensor([value]))),
            kind=kind,
            look=look,
            columns=tuple(loud.topk(min(shown, len(loud))).indices.tolist()),
            within_calibration=len(row.looks) <= len(one.looks),
        )

    def by_token(self, judged: Judged, columns: Float[Tensor, "pos columns"]) -> Float[Tensor, " pos"]:
        """What each token alone would score where an answer scored highest, before that look's own scale: for shading,
        not for flagging.
        """
        return self.of_kind[judged.kind].at(judged.look).score(torch.cat([columns, -columns], dim=-1))

    def calm(self, kind: int, columns: Sequence[int]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """Where the lower and the upper tail of some columns begin in clean answers to a kind of prompt.

        Raises TypeError for scores other than tail sums, which know no tails.
        """
        score = self.of_kind[kind].looks[-1].score
        if not isinstance(score, TailSum):
            raise TypeError(f"{type(score).__name__} does not know where a clean tail begins")
        at = torch.tensor(columns)
        start = score.start.cpu()
        return -start[at + len(start) // 2], start[at]

    def _kinds(self, rows: Sequence[Profile]) -> list[int]:
        return self.kinds.of(_prompts(rows))


def _prompts(rows: Sequence[Profile]) -> Float[Tensor, "rows features"]:
    return torch.stack([row.prompt for row in rows]) if rows else torch.empty(0, 0)


def _by_kind(kinds: PromptKinds, rows: Sequence[Profile]) -> list[list[Profile]]:
    of = kinds.of(_prompts(rows))
    return [[row for row, kind in zip(rows, of, strict=True) if kind == wanted] for wanted in range(kinds.n)]


def _moved(score: RowScore, device: torch.device | str) -> RowScore:
    if not is_dataclass(score):
        raise TypeError(f"{type(score).__name__} is no dataclass of tensors: it cannot be moved to {device}")
    held = {field.name: getattr(score, field.name) for field in fields(score)}
    moved = {name: value.to(device) for name, value in held.items() if isinstance(value, Tensor)}
    return cast("RowScore", replace(cast("Any", score), **moved))
