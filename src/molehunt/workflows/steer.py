"""The verb `steer`: fit a steering vector on two lists of prompts, and answer with it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from molehunt.contracts import Intervention
from molehunt.errors import UsageError, terminal_text
from molehunt.measure.threshold import check_rate
from molehunt.model.pair import ModelPair
from molehunt.run.literals import checked
from molehunt.run.progress import Track, silent
from molehunt.run.whole import write_whole
from molehunt.site import Site
from molehunt.steer.contrast import Method
from molehunt.steer.gate_fit import fit_gate
from molehunt.steer.prefill_gate import Condition
from molehunt.steer.trial import Steered, steered_by, strength_for
from molehunt.steer.vector import SteeringVector
from molehunt.traffic.chat import Text
from molehunt.workflows import inputs
from molehunt.workflows.inputs import Texts
from molehunt.workflows.models import Models, open_pair
from molehunt.workflows.result import summary_html, summary_repr
from molehunt.workflows.steer_fix import Match, Operator, ScopeName
from molehunt.workflows.steer_gate import GATE, GateResult
from molehunt.workflows.steer_trial import TrialResult, tried

VECTOR = "vector.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class SteerResult:
    """A fitted vector with the pair that it steers, and what was measured of it."""

    pair: ModelPair
    vector: SteeringVector
    strength: float | int
    operator: Operator
    scope: ScopeName
    gate: GateResult | None = None
    """The condition under which a prompt is steered; None where every prompt is."""
    trial: TrialResult | None = None
    """Answers with and without the vector; None where no prompts were given to try it on."""

    @property
    def condition(self) -> Condition | None:
        """The condition that a prompt must meet to be steered; None where every prompt is steered."""
        return None if self.gate is None else self.gate.condition

    def interventions(self, strength: float | int | None = None) -> list[Intervention]:
        """The edits that steer at this strength, for `pair.generate` and `edit_sites`. Neither scope nor gate is in them."""
        by = self.strength if strength is None else strength_for(self.operator, strength)
        return self.vector.interventions(by, operator=self.operator)

    def steered(self, strength: float | int | None = None) -> Steered:
        """From a model to a block inside which it is steered, with operator, scope and gate."""
        by = self.strength if strength is None else strength
        path = self.pair.layers_path
        return steered_by(
            self.vector, by, operator=self.operator, scope=self.scope, condition=self.condition, layers_path=path
        )

    def generate(
        self,
        texts: Sequence[Text],
        *,
        strength: float | int | None = None,
        max_new_tokens: int = 64,
        track: Track = silent,
    ) -> list[str]:
        """The tuned model's greedy answers while it is steered, in the order of the prompts.

        Args:
            texts: each is the text of one user turn, or the messages of a conversation.
            strength: see `steer`; by default that of the result.
            max_new_tokens: greatest number of tokens of an answer.
            track: shows progress.
        """
        with self.pair.tuned_model() as model, self.steered(strength)(model):
            return self.pair.generate(texts, max_new_tokens=max_new_tokens, track=track)

    def summary(self) -> str:
        """How the vector was fitted, its lengths, and what was measured of it."""
        facts = self.vector.facts
        lines = [f"{facts.method}: {facts.positive} prompts with the behaviour, {facts.negative} without"]
        lines += [f"{site:<8}norm {norm:.3g}" for site, norm in self._norms().items()]
        if self.gate is not None:
            lines.append(self.gate.summary())
        if self.trial is not None:
            lines.append(self.trial.summary())
        return terminal_text("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """What was fitted and measured, ready for JSON."""
        facts = self.vector.facts
        return {
            "method": facts.method,
            "norms": self._norms(),
            "positive": facts.positive,
            "negative": facts.negative,
            "strength": self.strength,
            "operator": self.operator,
            "scope": self.scope,
            "gate": None if self.gate is None else self.gate.to_dict(),
            "trial": None if self.trial is None else self.trial.to_dict(),
        }

    def save(self, folder: Path | str) -> Path:
        """Write the vector, the gate where there is one, and `steer.json` into `folder`, and return the vector's file."""
        folder = Path(folder)
        write_whole(folder / "steer.json", json.dumps(self.to_dict(), indent=2))
        if self.gate is not None:
            self.gate.condition.save(folder / GATE)
        return self.vector.save(folder / VECTOR)

    def _norms(self) -> dict[str, float]:
        return {f"L{layer}": float(value.norm()) for layer, value in sorted(self.vector.vectors.items())}

    def __repr__(self) -> str:
        return summary_repr(self)

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


@checked
def steer(
    base: Models,
    tuned: str | Path | None = None,
    *,
    positive: Texts,
    negative: Texts,
    layer: int | Sequence[int] | None = None,
    method: Method = "difference in means",
    strength: float | int | None = None,
    operator: Operator = "add",
    scope: ScopeName = "all",
    fpr: float | None = None,
    clean: Texts | None = None,
    prompts: Texts | None = None,
    match: Match | None = None,
    max_new_tokens: int = 32,
    trial_limit: int = 100,
    limit: int = 1000,
    adapter: bool | None = None,
    device: str = "cpu",
    seed: int = 0,
    track: Track = silent,
) -> SteerResult:
    """Fit a steering vector on two lists of prompts, and optionally a gate, and try it.

    Added with strength 1, the vector moves a prompt without the behaviour to one with it; strength -1 does the opposite.

    Args:
        base: a loaded pair, or the base's folder or hub id.
        tuned: the folder or hub id of the fine-tune; left out with a loaded pair.
        positive: prompts that trigger the behaviour.
        negative: prompts that do not trigger it.
        layer: 0-based block or blocks whose output is steered. `molehunt steer sweep` finds the block.
        method: how the direction is found; its length is the shift of means along it.
        strength: multiple of the vector's length that is added, by default -1; or share of the projection on it that is
            ablated (0 to 1), by default all of it.
        operator: whether the vector is added or its direction is ablated.
        scope: the tokens that the vector acts on.
        fpr: also fit a gate, which lets at most this share of clean prompts be steered; it takes the place of a scope.
        clean: clean prompts for the gate (else `negative`) and for the trial's cost (else bundled prompts).
        prompts: prompts to answer with and without the vector.
        match: a phrase, or several, by which an answer with the behaviour is recognised in the trial; or a function.
        max_new_tokens: greatest number of tokens of an answer in the trial.
        trial_limit: greatest number of prompts, and of clean prompts, that the trial answers.
        limit: greatest number of rows that are read for the fit.
        adapter: for a folder that holds full weights and an adapter, whether the adapter is applied.
        device: where the models run.
        seed: seed of the halves that fit and calibrate the gate.
        track: shows progress.

    Raises:
        UsageError: no layer, options that contradict each other or that nothing would use, or a negative strength to ablate.
        NotTestable: too few prompts on a side, no difference between the two, or too few clean prompts for `fpr`.
        MolehuntError: a model or a file cannot be read.

    Example:
        >>> import molehunt as mh
        >>> fitted = mh.steer("BASE", "TUNED", positive=triggered, negative=clean, layer=3)  # doctest: +SKIP
        >>> fitted.generate(triggered, strength=-2)  # doctest: +SKIP
    """
    layers = _layers(base, layer)
    strength = strength_for(operator, strength)
    _check(fpr, scope, clean, prompts, match)
    pair, model_hash = open_pair(base, tuned, adapter=adapter, device=device, track=track)
    suspect, harmless = inputs.prompts(positive, limit), inputs.prompts(negative, limit)
    vector = SteeringVector.fit(pair, suspect, harmless, layer=layers, method=method, model=model_hash, track=track)
    gate = None
    if fpr is not None:
        site = Site(min(vector.vectors))  # a gate is decided at the first block that is steered
        rows = harmless if clean is None else inputs.prompts(clean, limit)
        gate = GateResult(fitted=fit_gate(pair, suspect, rows, site, fpr=fpr, seed=seed, track=track))
    fitted = SteerResult(pair=pair, vector=vector, strength=strength, operator=operator, scope=scope, gate=gate)
    if prompts is None:
        return fitted
    trial = tried(
        pair,
        fitted.steered(),
        prompts=prompts,
        clean=clean,
        match=match,
        max_new_tokens=max_new_tokens,
        limit=trial_limit,
        track=track,
    )
    return replace(fitted, trial=trial)


def _layers(base: Models, layer: int | Sequence[int] | None) -> int | Sequence[int]:
    """The blocks to steer. Raises UsageError for none."""
    if layer is None or (not isinstance(layer, int) and not len(layer)):
        last = f"{base.n_layers - 1}" if isinstance(base, ModelPair) else "the number of blocks minus 1"
        raise UsageError(
            f"No block was given: give layer=…, from 0 to {last}. `molehunt steer sweep` finds the block that carries the "
            "behaviour."
        )
    return layer


def _check(
    fpr: float | None, scope: ScopeName, clean: Texts | None, prompts: Texts | None, match: Match | None
) -> None:
    if fpr is not None:
        check_rate(fpr)
    if fpr is not None and scope != "all":
        raise UsageError("fpr and scope say opposite things: a gate opens for whole prompts.")
    if match is not None and prompts is None:
        raise UsageError("match recognises the behaviour in answers: give prompts to answer, too.")
    if clean is not None and prompts is None and fpr is None:
        raise UsageError("clean prompts serve a gate or a trial: give fpr or prompts, too.")
