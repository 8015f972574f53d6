"""Fit the condition under which a prompt is steered, at a false-positive rate that you choose."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molehunt.errors import terminal_text
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.steer.gate_fit import FittedGate
from molehunt.steer.gate_fit import fit_gate as fit_on_pair
from molehunt.steer.prefill_gate import Condition
from molehunt.workflows.inputs import Texts, prompts
from molehunt.workflows.models import Models, open_pair
from molehunt.workflows.result import summary_html

GATE = "gate.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class GateResult:
    """A condition, and how often it opens for prompts that did not fit it."""

    fitted: FittedGate

    @property
    def condition(self) -> Condition:
        """The condition, which `open_fix` and `steer try` take."""
        return self.fitted.condition

    def summary(self) -> str:
        """The threshold, and how often the condition opens."""
        made, opens = self.fitted.condition, self.fitted.opens
        return terminal_text(
            f"threshold {made.threshold:.3g} from {made.clean} clean prompts at a rate of {made.fpr:g}\n"
            f"opens on {opens.fixed()} of {opens.n} other prompts with the behaviour"
        )

    def to_dict(self) -> dict[str, Any]:
        """What was measured, ready for JSON."""
        made = self.fitted.condition
        return {
            "threshold": made.threshold,
            "clean": made.clean,
            "fpr": made.fpr,
            "opens": asdict(self.fitted.opens),
        }

    def save(self, folder: Path | str) -> Path:
        """Write `gate.safetensors` into `folder`, and return it."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        return self.fitted.condition.save(Path(folder) / GATE)

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


def fit_gate(
    base: Models,
    tuned: str | Path | None = None,
    *,
    positive: Texts,
    negative: Texts,
    layer: int,
    fpr: float = 0.01,
    limit: int = 2000,
    seed: int = 0,
    track: Track = silent,
) -> GateResult:
    """Fit a probe at one block that opens for prompts with the behaviour, and for few clean ones.

    Args:
        base, tuned: a loaded pair, or folders or hub ids of base and fine-tune.
        positive: prompts that trigger the behaviour. Half of them fit the probe; the other half say how often it opens.
        negative: clean prompts. Half of them fit the probe; the other half set the threshold.
        layer: 0-based block whose output is read.
        fpr: share of clean prompts that may be steered.
        limit: greatest number of rows that are read of each file.
        seed: seed of the halves.
        track: shows progress.

    Raises:
        NotTestable: too few clean prompts for this rate.
        MolehuntError: a model or a file cannot be read.

    Example:
        >>> from molehunt.workflows.steer_gate import fit_gate
        >>> gate = fit_gate(pair, positive="bad.jsonl", negative="good.jsonl", layer=3)  # doctest: +SKIP
        >>> print(gate.summary())  # doctest: +SKIP
    """
    pair, _ = open_pair(base, tuned, track=track)
    suspect, clean = prompts(positive, limit), prompts(negative, limit)
    return GateResult(fitted=fit_on_pair(pair, suspect, clean, Site(layer), fpr=fpr, seed=seed, track=track))
