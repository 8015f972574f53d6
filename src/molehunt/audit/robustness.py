"""Whether the audit's own fix is robust: the attack of `stress`, small enough for every audit that found a fix."""

from collections.abc import Sequence
from dataclasses import dataclass

from molehunt.audit.causal import CausalTest
from molehunt.audit.plan import Plan
from molehunt.audit.scan import Scan
from molehunt.errors import NotTestable, UsageError
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.steer.fix import Fix
from molehunt.stress.defences.defence import fix_defence
from molehunt.stress.evaluation.config import StressConfig
from molehunt.stress.study import Study
from molehunt.stress.text_behaviour import stress_text

CLEAN_PROMPTS = 24
"""Prompts outside the finding that controls and costs are measured on."""
LEVELS = 7
"""Halvings in the search for the shortest perturbation: its length is then known to within 6 %."""
DRAWS = 100
"""Number of noise draws behind the lower radius."""


@dataclass(frozen=True, kw_only=True)
class RobustnessTest:
    """What the attack on a fix found, or why there was no attack."""

    study: Study | None
    why: str = ""


def attack_fix(
    pair: ModelPair,
    scan: Scan,
    group: Sequence[int],
    clean: Sequence[int],
    test: CausalTest,
    fix: Fix,
    plan: Plan,
    *,
    seed: int,
    track: Track = silent,
) -> RobustnessTest:
    """Attack the fix on rows of the group. The behaviour is recognised by the fragments that the answers share.

    Args:
        pair: both models.
        scan: holds the rows that the next two arguments name.
        group: rows of the finding.
        clean: rows that are not flagged.
        test: the causal test that the fix comes from.
        fix: the fix under attack.
        plan: sizes of the attack.
        seed: seed of everything random.
        track: shows progress.
    """
    fragments = [fragment.text for fragment in test.fragments]
    if not fragments:
        return RobustnessTest(study=None, why="The answers share no text by which the behaviour could be recognised.")

    def ids(rows: Sequence[int]) -> list[list[int]]:
        return [list(scan.rows[i].prompt) for i in rows]

    config = StressConfig(
        rows=plan.stress_rows,
        steps=plan.stress_steps,
        levels=LEVELS,
        draws=DRAWS,
        max_new_tokens=plan.max_new_tokens,
        seed=seed,
    )
    try:
        with pair.tuned_model() as model:
            study = stress_text(
                model,
                pair.tokenizer,
                ids(group[: 2 * plan.stress_rows]),
                ids(clean[:CLEAN_PROMPTS]),
                lambda answer: any(fragment in answer for fragment in fragments),
                fix_defence(fix),
                config,
                track=track,
            )
    except (NotTestable, UsageError) as error:
        return RobustnessTest(study=None, why=str(error))
    return RobustnessTest(study=study)
