"""A number that may enter a report: never without what it must beat."""

from dataclasses import dataclass

from molehunt.measure.interval import Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One result with its controls. A control that was not measured is None, and a report says so."""

    name: str
    """What was measured on what, such as "TPR of weight direction L6.mlp #0"."""
    score: Interval
    chance: Interval | None = None
    """The same by luck: random directions, a random dictionary, permuted labels."""
    baseline: Interval | None = None
    """The same by a trivial method: text-only TF-IDF, the norm of the difference, a string filter."""
    near_miss: Interval | None = None
    """The same on rows that look triggered and are not."""
    twin: Interval | None = None
    """The same on the clean twin."""
    fpr: float | None = None
    """The rate at which clean traffic set the threshold; None for a measure without one."""

    def __post_init__(self) -> None:
        if self.chance is None and self.baseline is None:
            raise ValueError(
                f"{self.name}: a result without its control cannot be reported; measure chance or a baseline"
            )
        if self.fpr is not None and not 0 < self.fpr < 1:
            raise ValueError(f"{self.name}: fpr must lie between 0 and 1, got {self.fpr}")

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Names of the controls that are missing."""
        controls = ("chance", "baseline", "near_miss", "twin")
        return tuple(name for name in controls if getattr(self, name) is None)

    @property
    def stands(self) -> bool:
        """Whether the score's lower limit lies above the upper limit of every control that was measured."""
        controls = (self.chance, self.baseline, self.near_miss, self.twin)
        return all(self.score.low > control.high for control in controls if control is not None)
