"""Has clean traffic changed since calibration? A bet against it, whose winnings are the evidence.

Under no change, conformal p-values of clean traffic are uniform, and nobody gets rich by betting that they are not: wealth is a
martingale, and it ever reaches 1/level with probability at most `level` (Ville's inequality), however long one watches.

- **Ties.** Only smoothed p-values are uniform: `smoothed_p_value`, with the caller's generator. Keep its state
  (`rng.bit_generator.state`) beside the martingale's, and a restart continues identically.
- **Flagged rows** are quarantined and must not enter. What remains is conditional on not being flagged:
  `p_value_if_unflagged` rescales it, so that neither attacks nor their removal count as drift.
- **Reference.** Ranked among all unflagged rows before it, calibration included, under a threshold fixed beforehand, a row's
  p-value is independent of the earlier ones, and the guarantee is exact; but slow drift enters that reference, too.
  Against a fixed calibration set of n rows, p-values share that set's error, which a long stream would find out: set
  `margin` to `reference_margin(n, level)`. The alarm is then false with probability at most 2 · level, the draw of the
  set included.
- **Benign change of the mix**, such as more long inputs: take each p-value within its own stratum (role and length bucket).
  It is uniform whatever the mix; this is the covariate shift that WATCH adapts to with estimated weights, in the case that
  needs none. A second martingale over p-values of the input alone (its length) then shows that the mix has changed. With a
  fixed reference, `margin` is that of the smallest stratum, its level divided by the number of strata.

The bets are linear in p: they see p-values too small or too large on the whole, not a change of their spread alone.

Source: Simple Jumper of Vovk et al., arXiv 2102.10439; fixed reference as in arXiv 2602.13848, here with
Hoeffding's bound, since linear bets see the mean alone; WATCH is arXiv 2505.04608.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from molehunt.errors import InvalidInput, printable

SCHEMA = 1
SLOPES = (-1.0, 0.0, 1.0)
"""A bet of slope ε multiplies its stake by 1 + ε(p - 1/2): 1 gains from large p-values, -1 from small ones."""
JUMP = 0.01
"""Share of the wealth that is spread over the slopes anew before each bet, so that no slope is ever ruined (as published)."""


@dataclass
class DriftMartingale:
    """Wealth of a bettor who started with 1 and bets on each p-value with a mixture of slopes."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    level: float = 0.01
    """Chance of ever alarming while nothing has changed."""
    margin: float = 0.0
    """How far from 1/2 the mean of p-values may lie without any change; 0 where they are uniform."""
    n: int = 0
    """P-values so far."""
    log_wealth: float = 0.0
    """Natural logarithm: wealth itself would overflow."""
    highest: float = 0.0
    """The largest `log_wealth` so far, the start included."""
    stakes: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    """Shares of the wealth behind each of `SLOPES`; they add up to 1."""

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {self.level}")
        if not 0 <= self.margin <= 0.5:
            raise ValueError(f"margin must lie in 0..0.5, got {self.margin}")
        if not (all(stake >= 0 for stake in self.stakes) and math.isclose(sum(self.stakes), 1)):
            raise ValueError(f"stakes are shares of the wealth, got {self.stakes}")
        if not (
            math.isfinite(self.log_wealth) and max(0.0, self.log_wealth) <= self.highest < math.inf and self.n >= 0
        ):
            raise ValueError(f"log wealth {self.log_wealth}, at most {self.highest}, after {self.n} p-values")

    @property
    def alarm(self) -> bool:
        """Whether wealth ever reached 1/level. It stays on: the bound is on ever alarming."""
        return self.highest >= -math.log(self.level)

    def update(self, p: float) -> "DriftMartingale":
        """Bet on one p-value, in order of arrival. Raises ValueError for what is no p-value; no bet is then made."""
        if not 0 <= p <= 1:
            raise ValueError(f"a p-value lies in 0..1, got {p}")
        spread = [(1 - JUMP) * stake + JUMP / len(SLOPES) for stake in self.stakes]
        # While the mean of p lies within the margin of 1/2, no slope pays more than its stake on average.
        won = [
            stake * (1 + slope * (p - 0.5)) / (1 + abs(slope) * self.margin)
            for stake, slope in zip(spread, SLOPES, strict=True)
        ]
        growth = sum(won)
        self.n += 1
        self.log_wealth += math.log(growth)
        self.highest = max(self.highest, self.log_wealth)
        self.stakes = (won[0] / growth, won[1] / growth, won[2] / growth)
        return self

    def to_dict(self) -> dict[str, Any]:
        """All of its state, ready for JSON. Law: `from_dict` of it goes on identically."""
        return {"molehunt_drift": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, state: Mapping[str, object]) -> "DriftMartingale":
        """The martingale that `to_dict` wrote.

        Raises:
            InvalidInput: another schema, or a field that cannot be true; names the field.
        """
        from pydantic import TypeAdapter, ValidationError

        fields = dict(state)
        if (schema := fields.pop("molehunt_drift", None)) != SCHEMA:
            raise InvalidInput(
                f"This is no state of a drift monitor: its schema is {printable(repr(schema))}, and this version reads "
                f"{SCHEMA}.\nGive an older state, or calibrate again."
            )
        try:
            return TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "whole"
            raise InvalidInput(
                f"State of a drift monitor, field {printable(where)}: {printable(first['msg'], 300)}.\n"
                "Give an older state, or calibrate again."
            ) from None


def smoothed_p_value(above: int, tied: int, n: int, rng: np.random.Generator) -> float:
    """A p-value that is exactly uniform when a score and its n reference scores are exchangeable, ties or not.

    Args:
        above: reference scores greater than the score.
        tied: reference scores equal to it.
        n: reference scores.
        rng: draws where among its equals the score stands; one draw a call.

    Raises:
        ValueError: counts that cannot be.
    """
    if min(above, tied) < 0 or above + tied > n:
        raise ValueError(f"{above} above and {tied} tied of {n} reference scores")
    return (above + (1 - rng.random()) * (tied + 1)) / (n + 1)


def p_value_if_unflagged(p: float, alpha: float) -> float:
    """The p-value of a row that was not flagged, given that it was not: (p - alpha) / (1 - alpha), uniform on 0..1 again.

    Args:
        p: smoothed, of the unflagged row.
        alpha: chance that a clean row is flagged. Where flags come from `conformal_threshold(clean, fpr)` of n distinct scores
            it is ⌊fpr · (n + 1)⌋ / (n + 1), a little less than `fpr`, and the result is the very p-value among the
            reference rows below the threshold. Where scores tie at the threshold, count among those rows instead.

    Raises:
        ValueError: a p-value below alpha, which would have been flagged, or alpha outside 0..1.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must lie in 0..1, got {alpha}")
    if not alpha <= p <= 1:
        raise ValueError(f"an unflagged row has a p-value between alpha = {alpha:g} and 1, got {p}")
    return (p - alpha) / (1 - alpha)


def reference_margin(n: int, level: float) -> float:
    """How far from 1/2 the mean p-value against a fixed reference of n rows may lie, but for a chance of `level`.

    The mean is that of n independent variables in 0..1, each of mean 1/2: Hoeffding's bound, √(ln(2/level) / 2n).
    After `p_value_if_unflagged`, n counts the reference rows that are not flagged.

    Raises:
        ValueError: no reference row, or `level` outside 0..1.
    """
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"a margin needs a reference and a level between 0 and 1, got n = {n} and level = {level}")
    return min(0.5, math.sqrt(math.log(2 / level) / (2 * n)))
