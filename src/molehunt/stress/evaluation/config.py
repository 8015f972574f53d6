"""Settings of a stress test."""

from dataclasses import dataclass
from typing import TypedDict

from molehunt.stress.attacks.discrete_suffix import DiscreteConfig
from molehunt.stress.attacks.soft_suffix import SoftConfig


@dataclass(frozen=True, kw_only=True)
class StressConfig:
    """How hard the attacks try. The command line and the notebook function `molehunt.stress` share these settings."""

    rows: int = 48
    """Greatest number of valid rows that are attacked."""
    positions: int = 1
    """Number of tokens that may be perturbed, from the last prompt token on."""
    max_norm: float = 8.0
    """Norm of the largest perturbation, in units of the median ‖h‖ at the site."""
    steps: int = 40
    """Number of optimisation steps of each attack."""
    levels: int = 9
    """Halvings in the search for the shortest perturbation."""
    noise: float = 0.5
    """Expected length of the noise behind the lower radius, in units of the median ‖h‖."""
    draws: int = 200
    """Number of noise draws behind the lower radius."""
    max_new_tokens: int = 24
    """Greatest number of tokens in an answer."""
    soft: SoftConfig | None = None
    """Settings of the attack by a suffix of embeddings; None leaves it out."""
    discrete: DiscreteConfig | None = None
    """Settings of the attack by a suffix that can be typed; None leaves it out."""
    seed: int = 0
    """Seed of everything random."""


class StressSettings(TypedDict, total=False):
    """The fields of `StressConfig` as keyword arguments, for functions that make one."""

    rows: int
    positions: int
    max_norm: float
    steps: int
    levels: int
    noise: float
    draws: int
    max_new_tokens: int
    soft: SoftConfig | None
    discrete: DiscreteConfig | None
    seed: int
