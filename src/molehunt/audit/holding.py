"""Does the audit's own fix hold? The attack of `stress`, small enough for every audit that found one."""

from collections.abc import Sequence
from dataclasses import dataclass

from molehunt.audit.causal import CausalTest
from molehunt.audit.plan import Plan
from molehunt.audit.scan import Scan
from molehunt.errors import NotTestable, UsageError
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.steer.fix import Fix
from molehunt.stress.defended import fixed
from molehunt.stress.study import StressConfig, Study
from molehunt.stress.text_behaviour import stress_text
from molehunt.traffic.chat import prompt_ids

CLEAN = 24
"""Prompts outside the finding: for controls and cost."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What the attack found, or why there was none."""

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
) -> Holding:
    """Attack the fix on rows of the group. The behaviour is known by the fragments that the group's answers share."""
    fragments = [fragment.text for fragment in test.fragments]
    if not fragments:
        return Holding(study=None, why="The answers share no text by which the behaviour could be known again.")

    def ids(rows: Sequence[int]) -> list[list[int]]:
        return [prompt_ids(pair.tokenizer, scan.rows[i].example.prompt) for i in rows]

    config = StressConfig(
        rows=plan.stress_rows,
        steps=plan.stress_steps,
        levels=7,  # lengths to 6 %
        draws=100,
        max_new_tokens=plan.max_new_tokens,
        seed=seed,
    )
    try:
        with pair.tuned_model() as model:
            study = stress_text(
                model,
                pair.tokenizer,
                ids(group[: 2 * plan.stress_rows]),
                ids(clean[:CLEAN]),
                lambda answer: any(fragment in answer for fragment in fragments),
                fixed(fix),
                config,
                track=track,
            )
    except (NotTestable, UsageError) as error:
        return Holding(study=None, why=str(error))
    return Holding(study=study)
