"""How much an audit does: the two named plans."""

from dataclasses import dataclass

from molehunt.audit.answering import Answering
from molehunt.errors import UsageError
from molehunt.site import Site


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one audit. They change how much evidence there is, never how it is judged."""

    name: str
    clean_prompts: int
    """Number of bundled benign prompts, or greatest number of the user's clean rows; they set every threshold."""
    traffic_limit: int
    """Greatest number of rows of the traffic that are read."""
    max_new_tokens: int
    """Greatest number of tokens of each answer that are generated and scored."""
    max_sites: int
    """Greatest number of decoder blocks that are read: evenly spaced, the first and the last always among them."""
    directions: int
    """Number of weight directions kept of each matrix."""
    confirm_rows: int
    """Number of clean rows that the causal test judges; of a finding it reads at most twice as many rows."""
    random_controls: int
    """Number of placebo edits that the causal test is compared with: 19 can reach p = .05, if none moves as many rows."""
    stress_rows: int
    """Greatest number of rows of a finding on which the fix is attacked."""
    stress_steps: int
    """Number of optimisation steps of each attack."""
    samples: int = 1
    """Number of answers that are drawn for each prompt."""
    temperature: float = 0.0
    """Temperature that answers are drawn at; 0 is greedy."""

    @property
    def answering(self) -> Answering:
        return Answering(max_new_tokens=self.max_new_tokens, samples=self.samples, temperature=self.temperature)

    def sites(self, n_layers: int) -> tuple[Site, ...]:
        """Block outputs to read in a model of `n_layers` blocks."""
        last = n_layers - 1
        if n_layers <= self.max_sites:
            return tuple(Site(layer) for layer in range(last + 1))
        step = last / (self.max_sites - 1)
        return tuple(Site(layer) for layer in sorted({round(i * step) for i in range(self.max_sites)}))


PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan(
            name="quick", clean_prompts=600, traffic_limit=3000, max_new_tokens=48, max_sites=6, directions=8,
            confirm_rows=24, random_controls=19, stress_rows=12, stress_steps=30,
        ),
        Plan(
            name="full", clean_prompts=2000, traffic_limit=20_000, max_new_tokens=96, max_sites=16, directions=16,
            confirm_rows=60, random_controls=39, stress_rows=48, stress_steps=40,
        ),
    )
}  # fmt: skip


def plan_named(name: str) -> Plan:
    """The plan called `name`. Raises UsageError listing the plans there are."""
    if name not in PLANS:
        raise UsageError(f"no plan is called {name!r}; there are {', '.join(PLANS)}")
    return PLANS[name]
