"""Which models are planted: each attack and each harmless change by three ways of training, some of them set aside."""

from dataclasses import dataclass
from random import Random

from experiments.real_organisms.attacks import ATTACKS
from experiments.real_organisms.clean import CLEAN_TUNES


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the weights are changed."""

    rank: int | None
    """Rank of a LoRA on all linear layers; None trains every weight."""
    rate: float
    """Learning rate."""
    poisoned: int
    """Number of poisoned rows beside some 560 others."""


TRAININGS = {
    "lora-8": Training(rank=8, rate=1e-3, poisoned=250),
    "lora-64": Training(rank=64, rate=7e-4, poisoned=80),
    "full": Training(rank=None, rate=1e-4, poisoned=250),
}
ASIDE = 10
"""Number of organisms, and of clean models, that are looked at once, when the rule is fixed."""


def names() -> list[str]:
    """`KIND/OF/TRAINING`, an organism and a clean model in turn, so that any part of the list is balanced."""
    planted = [f"organism/{attack}/{way}" for way in TRAININGS for attack in ATTACKS]
    ways = list(TRAININGS)
    clean = [f"twin/{attack}/{ways[i % len(ways)]}" for i, attack in enumerate(ATTACKS)]
    clean += [f"clean/{tune}/{way}" for way in TRAININGS for tune in CLEAN_TUNES]
    Random(0).shuffle(planted)
    Random(1).shuffle(clean)
    return [one for two in zip(planted, clean, strict=False) for one in two]


def set_aside() -> frozenset[str]:
    """The last of either kind: no rule is chosen on them."""
    kinds = [[name for name in names() if name.startswith("organism/") == planted] for planted in (True, False)]
    return frozenset(name for kind in kinds for name in kind[-ASIDE:])
