"""The sections about a finding's fix: where an edit switches it off, how to use the fix, and whether it resists attacks."""

import shlex

from molehunt.audit.causal import CausalTest
from molehunt.audit.result import Audit
from molehunt.audit.robustness import RobustnessTest
from molehunt.measure.interval import Interval
from molehunt.report.schema import BlockShare, FixAttack, FixRobustness, Measure, Step, SwitchOff
from molehunt.report.stress_page import MEANINGS, NAMES


def switch_off(audit: Audit, test: CausalTest) -> SwitchOff:
    """What an edit at each block does. There is a file, with commands, only if an edit beats random ones of its size."""
    blocks = tuple(
        BlockShare(
            block=str(one.site),
            intervention=one.intervention,
            removed=Measure.from_interval(one.reverted),
            control=Measure.from_interval(one.control),
        )
        for one in test.by_site
    )
    if audit.fix is None:
        return SwitchOff(blocks=blocks, file=None)
    pair = _both_models(audit)
    steps = (
        Step(
            what="Answers with and without it, on prompts of your own, and what it costs on clean ones",
            command=f"molehunt steer try {pair} {shlex.quote(str(audit.fix))} --prompts PROMPTS.jsonl",
        ),
        Step(
            what="Serve the model; each answer that leaves the range of clean traffic is steered, no other",
            command=f"molehunt serve {pair} --action steer",
        ),
    )
    return SwitchOff(blocks=blocks, file=audit.fix.name, steps=steps)


def fix_robustness(audit: Audit, test: CausalTest, found: RobustnessTest) -> FixRobustness:
    """What the attacks on the fix recovered; where there was no attack, why not."""
    study = found.study
    if study is None:
        return FixRobustness(verdict="NOT TESTABLE", why=found.why)
    phrases = " ".join(f"--match {shlex.quote(one.text)}" for one in test.fragments)
    fix = shlex.quote(str(audit.fix))
    return FixRobustness(
        verdict=study.verdict,
        why=MEANINGS[study.verdict],
        attacks=tuple(
            FixAttack(
                name=NAMES[arm.name],
                recovered=Measure.from_interval(arm.recovered),
                length=_length(arm.epsilon50),
                drift=float(arm.drift.pre.median()),
            )
            for arm in study.arms
        ),
        controls=tuple(
            FixAttack(name=one.name, recovered=Measure.from_interval(one.recovered), length=_length(one.epsilon50))
            for one in study.controls.values()
        ),
        gap=_length(study.specificity_gap),
        command=f"molehunt stress {_both_models(audit)} --fix {fix} --prompts PROMPTS.jsonl {phrases}",
    )


def _both_models(audit: Audit) -> str:
    return shlex.join([str(audit.base.path), str(audit.tuned.path)])


def _length(found: Interval | None) -> Measure | None:
    return None if found is None else Measure.from_interval(found)
