"""A false-alarm rate for whole answers: fitted scores at every look, joined into one, with a split-conformal p-value.

The joint rate over all directions, looks and lengths is what was asked for, by construction: the score of an answer is
the largest over its looks, and clean answers that fitted nothing say how large that gets. Source: split conformal
prediction, as in `measure.threshold`; the published alternative is `watch.ranges`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.errors import NotTestable
from molehunt.measure.threshold import conformal_p_values, conformal_threshold
from molehunt.traffic.split import Calibrate, Fit, expect
from molehunt.watch.profile import Profile, RunningProfile, look_of
from molehunt.watch.scores import RowScore, TailSum, tail

LEAST = 60
"""Clean answers that a look needs: a third of them set its scale."""

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


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a monitor says of one answer."""

    score: float
    p_value: float
    """Chance of a clean answer that scores at least as high."""
    look: int
    """The look that scored highest; 0 is the decision position alone."""
    columns: tuple[int, ...]
    """Columns that say most about it, highest first; see `Bank.names`. Those from `n` on are the negatives."""
    within_calibration: bool
    """False for an answer longer than those that clean traffic showed: its rate is not promised."""


@dataclass(frozen=True, eq=False)
class Monitor:
    """Fitted looks and the scores of clean answers that fitted nothing."""

    looks: tuple[Look, ...]
    calibration: Float[Tensor, " n"]

    @classmethod
    def fit(cls, fit: Fit[Profile], calibrate: Calibrate[Profile], score: FitScore = TailSum.fit) -> "Monitor":
        """Fit on clean answers; the calibration answers choose nothing.

        Raises:
            NotTestable: fewer than `LEAST` answers to fit on.
            WrongSplit: other splits were given.
        """
        rows, calibrated = expect(Fit, fit).rows, expect(Calibrate, calibrate).rows
        looks: list[Look] = []
        for j in range(max((len(row.looks) for row in rows), default=0)):
            extremes = torch.stack([row.looks[j] for row in rows if len(row.looks) > j])
            if len(extremes) < LEAST:
                break
            held = len(extremes) // 3  # the score's own scale is set on rows that did not fit it
            fitted = score(extremes[held:])
            start, scale = tail(fitted(extremes[:held])[:, None])
            looks.append(Look(fitted, float(start), float(scale)))
        if not looks:
            raise NotTestable(
                f"{len(rows)} clean answers are too few to fit a monitor on; it takes at least {LEAST}.\n"
                "Give more clean traffic."
            )
        monitor = cls(tuple(looks), torch.empty(0))
        return cls(monitor.looks, monitor.scores(calibrated))

    def scores(self, rows: Sequence[Profile]) -> Float[Tensor, " rows"]:
        """One score per answer: the largest surprise over its looks."""
        highest = torch.full((len(rows),), -torch.inf)
        for j in range(max((len(row.looks) for row in rows), default=0)):
            at = [i for i, row in enumerate(rows) if len(row.looks) > j]
            surprise = self._at(j).surprise(torch.stack([rows[i].looks[j] for i in at]))
            highest[at] = highest[at].maximum(surprise)
        return highest

    def running(self, growing: RunningProfile) -> Float[Tensor, " batch"]:
        """What answers that still grow score at the look each has begun: never more than that look will say in the end.

        Values stay on the device of `growing`, where this monitor must be, too (see `to`). NaN is kept.
        """
        looks = [look_of(tokens) for tokens in growing.tokens]
        found = growing.extremes.new_empty(len(looks))
        for j in set(looks):
            rows = [row for row, look in enumerate(looks) if look == j]
            found[rows] = self._at(j).surprise(growing.extremes[rows])
        return found

    def to(self, device: torch.device | str) -> "Monitor":
        """The same monitor with what it needs to score on a device; calibration stays on the CPU."""
        looks = tuple(replace(look, score=_moved(look.score, device)) for look in self.looks)
        return Monitor(looks, self.calibration)

    def threshold(self, fpr: float) -> float:
        """Flag above this. Raises NotTestable where calibration is too small for the rate: the monitor abstains."""
        return conformal_threshold(self.calibration, fpr)

    def judge(self, row: Profile, shown: int = 5) -> Judged:
        """Score, p-value and the columns that speak loudest."""
        surprises = self._surprises(row)
        look = int(surprises.argmax())
        loud = self._at(look).score.by_column(row.looks[look][None])[0]
        value = float(surprises[look])
        return Judged(
            score=value,
            p_value=float(conformal_p_values(self.calibration, torch.tensor([value]))),
            look=look,
            columns=tuple(loud.topk(min(shown, len(loud))).indices.tolist()),
            within_calibration=len(row.looks) <= len(self.looks),
        )

    def by_token(self, look: int, columns: Float[Tensor, "pos columns"]) -> Float[Tensor, " pos"]:
        """What each token alone would score at a look, before its own scale: for shading, not for flagging."""
        return self._at(look).score(torch.cat([columns, -columns], dim=-1))

    def _at(self, look: int) -> Look:
        """An answer longer than any that was fitted is held against the longest."""
        return self.looks[min(look, len(self.looks) - 1)]

    def _surprises(self, row: Profile) -> Float[Tensor, " looks"]:
        return torch.cat([self._at(j).surprise(extremes[None]) for j, extremes in enumerate(row.looks)])


def _moved(score: RowScore, device: torch.device | str) -> RowScore:
    if not is_dataclass(score):
        raise TypeError(f"{type(score).__name__} is no dataclass of tensors: it cannot be moved to {device}")
    held = {field.name: getattr(score, field.name) for field in fields(score)}
    moved = {name: value.to(device) for name, value in held.items() if isinstance(value, Tensor)}
    return cast("RowScore", replace(cast("Any", score), **moved))
