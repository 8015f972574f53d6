"""A false-alarm rate for whole answers: fitted scores at every prefix checkpoint, joined, with a split-conformal p-value.

The joint rate over all directions, checkpoints and lengths is the requested one by construction: the score of an answer
is the largest over its checkpoints, and clean answers that fitted nothing show how large that gets. An answer is compared
with clean answers to prompts of the same stratum (see `watch.strata`), and the scores of each stratum are shifted so that
one threshold serves all of them. Source: split conformal prediction, as in `measure.threshold`; the published alternative
is `watch.ranges`.
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
from molehunt.watch.profile import Profile, RunningProfile, prefix_index
from molehunt.watch.scores import TAIL, RowScore, TailSum, tail
from molehunt.watch.strata import PromptStrata

LEAST = 60
"""Number of clean answers that a prefix checkpoint needs: a third of them set its scale."""
LEAST_BEYOND = 20
"""Number of answers in the tail of a checkpoint's own score, or half of all answers: two or three do not show how wide the
tail is, and a checkpoint whose tail is estimated too narrow would dominate all others."""
LEAST_OF_STRATUM = 300
"""Number of calibration rows that a stratum needs; a low rate needs more: 1/rate."""

FitScore = Callable[[Float[Tensor, "rows columns"]], RowScore]


@dataclass(frozen=True, eq=False)
class PrefixScore:
    """The score at one prefix checkpoint, and the tail that clean answers of that length show."""

    score: RowScore
    start: float
    """Score at which the clean tail begins."""
    scale: float
    """Mean excess of clean answers in that tail."""

    def surprise(self, extremes: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
        """The score in units of its own clean tail, roughly nats of rarity: comparable between checkpoints."""
        return (self.score(extremes) - self.start) / self.scale


@dataclass(frozen=True, eq=False)
class StratumCalibration:
    """The scores fitted to clean answers in one stratum, and the scores of calibration answers that fitted nothing."""

    prefixes: tuple[PrefixScore, ...]
    calibration: Float[Tensor, " n"]

    @classmethod
    def fit(cls, fit: Sequence[Profile], calibrate: Sequence[Profile], score: FitScore) -> "StratumCalibration":
        """Fit one score for each prefix checkpoint. Raises NotTestable for fewer than `LEAST` answers to fit on."""
        prefixes: list[PrefixScore] = []
        for j in range(max((len(row.prefixes) for row in fit), default=0)):
            extremes = torch.stack([row.prefixes[j] for row in fit if len(row.prefixes) > j])
            if len(extremes) < LEAST:
                break
            scale_rows = (
                torch.arange(len(extremes)) % 3 == 0
            )  # the score's own scale is set on rows that did not fit it
            fitted = score(extremes[~scale_rows])
            own = fitted(extremes[scale_rows])
            start, scale = tail(own[:, None], max(0.5, min(TAIL, 1 - LEAST_BEYOND / len(own))))
            prefixes.append(PrefixScore(fitted, float(start), float(scale)))
        if not prefixes:
            raise NotTestable(
                f"{len(fit)} clean answers are too few to fit a monitor on; it takes at least {LEAST}.\n"
                "Give more clean traffic."
            )
        fresh = cls(tuple(prefixes), torch.empty(0))
        return cls(fresh.prefixes, fresh.scores(calibrate))

    def at(self, prefix: int) -> PrefixScore:
        """The score at a checkpoint; answers longer than every fitted one are compared with the longest."""
        return self.prefixes[min(prefix, len(self.prefixes) - 1)]

    def scores(self, rows: Sequence[Profile]) -> Float[Tensor, " rows"]:
        """One score per answer: the largest over its prefix checkpoints."""
        highest = torch.full((len(rows),), -torch.inf)
        for j in range(max((len(row.prefixes) for row in rows), default=0)):
            at = [i for i, row in enumerate(rows) if len(row.prefixes) > j]
            surprise = self.at(j).surprise(torch.stack([rows[i].prefixes[j] for i in at]))
            highest[at] = highest[at].maximum(surprise)
        return highest

    def shifted_down(self, by: float) -> "StratumCalibration":
        """The same calibration with every score lower by this number."""
        prefixes = tuple(replace(one, start=one.start + by * one.scale) for one in self.prefixes)
        return StratumCalibration(prefixes, self.calibration - by)

    def to(self, device: torch.device | str) -> "StratumCalibration":
        prefixes = tuple(replace(one, score=_moved(one.score, device)) for one in self.prefixes)
        return StratumCalibration(prefixes, self.calibration)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The judgement of a monitor on one answer."""

    score: float
    p_value: float
    """Conformal: share of clean answers in the same stratum that score at least as high."""
    stratum: int
    """The stratum of the prompt."""
    prefix: int
    """Index of the prefix checkpoint that scored highest; 0 is the decision position alone."""
    columns: tuple[int, ...]
    """The top-scoring columns, highest first; see `Bank.names`. Indices from `n` on stand for the lower ends."""
    within_calibration: bool
    """False for an answer longer than the clean ones: its rate is not promised."""


@dataclass(frozen=True, eq=False)
class Monitor:
    """Scores answers and flags those above `threshold`."""

    strata: PromptStrata
    by_stratum: tuple[StratumCalibration, ...]
    threshold: float

    @classmethod
    def fit(
        cls, fit: Fit[Profile], calibrate: Calibrate[Profile], *, fpr: float, score: FitScore = TailSum.fit
    ) -> "Monitor":
        """Fit on clean answers; the calibration answers choose nothing but the threshold.

        Prompts are divided into as many strata as there are enough rows to calibrate each one for `fpr`.

        Raises:
            NotTestable: fewer than `LEAST` answers to fit on, or too few to calibrate for `fpr`: the monitor abstains.
            WrongSplit: other splits were given.
        """
        rows, calibrated = expect(Fit, fit).rows, expect(Calibrate, calibrate).rows
        strata = PromptStrata.fit(
            _prompts(rows),
            _prompts(calibrated),
            least=3 * LEAST,
            least_calibrate=max(math.ceil(1 / fpr), LEAST_OF_STRATUM),
        )
        to_fit, to_calibrate = (_by_stratum(strata, some) for some in (rows, calibrated))
        each = [StratumCalibration.fit(a, b, score) for a, b in zip(to_fit, to_calibrate, strict=True)]
        thresholds = [conformal_threshold(one.calibration, fpr) for one in each]
        shared = thresholds[max(range(strata.n), key=lambda stratum: len(to_calibrate[stratum]))]
        return cls(
            strata, tuple(one.shifted_down(own - shared) for one, own in zip(each, thresholds, strict=True)), shared
        )

    @property
    def calibration(self) -> Float[Tensor, " n"]:
        """Scores of the calibration answers of all strata."""
        return torch.cat([one.calibration for one in self.by_stratum])

    def scores(self, rows: Sequence[Profile]) -> Float[Tensor, " rows"]:
        """One score per answer: the largest over its prefix checkpoints."""
        found = torch.empty(len(rows))
        strata = self._strata_of(rows)
        for stratum, one in enumerate(self.by_stratum):
            at = [i for i, of in enumerate(strata) if of == stratum]
            found[at] = one.scores([rows[i] for i in at])
        return found

    def running(self, growing: RunningProfile) -> Float[Tensor, " batch"]:
        """Scores of growing answers at the checkpoint that each has reached: never above the final score at that checkpoint.

        Values stay on the device of `growing`, where this monitor must be, too (see `to`). NaN is kept.
        """
        at = list(zip(self.strata.of(growing.prompts), map(prefix_index, growing.tokens), strict=True))
        if len(set(at)) == 1:
            stratum, prefix = at[0]
            return self.by_stratum[stratum].at(prefix).surprise(growing.extremes)
        found = growing.extremes.new_empty(len(at))
        for stratum, prefix in set(at):
            rows = [row for row, place in enumerate(at) if place == (stratum, prefix)]
            found[rows] = self.by_stratum[stratum].at(prefix).surprise(growing.extremes[rows])
        return found

    def to(self, device: torch.device | str) -> "Monitor":
        """The same monitor with its scores on a device; strata and calibration stay on the CPU."""
        return replace(self, by_stratum=tuple(one.to(device) for one in self.by_stratum))

    def judge(self, row: Profile, shown: int = 5) -> Judgement:
        """Score, p-value and the `shown` top-scoring columns of one answer."""
        (stratum,) = self._strata_of([row])
        one = self.by_stratum[stratum]
        surprises = torch.cat([one.at(j).surprise(extremes[None]) for j, extremes in enumerate(row.prefixes)])
        prefix = int(surprises.argmax())
        by_column = one.at(prefix).score.by_column(row.prefixes[prefix][None])[0]
        value = float(surprises[prefix])
        return Judgement(
            score=value,
            p_value=float(conformal_p_values(one.calibration, torch.tensor([value]))),
            stratum=stratum,
            prefix=prefix,
            columns=tuple(by_column.topk(min(shown, len(by_column))).indices.tolist()),
            within_calibration=len(row.prefixes) <= len(one.prefixes),
        )

    def by_token(self, judged: Judgement, columns: Float[Tensor, "pos columns"]) -> Float[Tensor, " pos"]:
        """Score of each token alone at the checkpoint where the answer scored highest, before that checkpoint's own
        scale: for shading, not for flagging.
        """
        return self.by_stratum[judged.stratum].at(judged.prefix).score(torch.cat([columns, -columns], dim=-1))

    def clean_tails(self, stratum: int, columns: Sequence[int]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """Values at which the lower and the upper tail of some columns begin in the clean answers of a stratum.

        Raises TypeError for scores other than tail sums, which know no tails.
        """
        score = self.by_stratum[stratum].prefixes[-1].score
        if not isinstance(score, TailSum):
            raise TypeError(f"{type(score).__name__} does not know where a clean tail begins")
        at = torch.tensor(columns)
        start = score.start.cpu()
        return -start[at + len(start) // 2], start[at]

    def _strata_of(self, rows: Sequence[Profile]) -> list[int]:
        return self.strata.of(_prompts(rows))


def _prompts(rows: Sequence[Profile]) -> Float[Tensor, "rows features"]:
    return torch.stack([row.prompt for row in rows]) if rows else torch.empty(0, 0)


def _by_stratum(strata: PromptStrata, rows: Sequence[Profile]) -> list[list[Profile]]:
    of = strata.of(_prompts(rows))
    return [[row for row, stratum in zip(rows, of, strict=True) if stratum == wanted] for wanted in range(strata.n)]


def _moved(score: RowScore, device: torch.device | str) -> RowScore:
    if not is_dataclass(score):
        raise TypeError(f"{type(score).__name__} is no dataclass of tensors: it cannot be moved to {device}")
    values = {field.name: getattr(score, field.name) for field in fields(score)}
    moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    return cast("RowScore", replace(cast("Any", score), **moved))
