"""Whether the audit's fix holds: what `stress` found, as the report shows it."""

import math
import shlex

from molehunt.audit.holding import Holding
from molehunt.audit.run import Audit
from molehunt.measure.interval import Interval
from molehunt.report.measured import measure
from molehunt.report.schema import Attack, Holds, Measure
from molehunt.report.stress_page import MEANINGS, NAMES


def holds(audit: Audit, found: Holding) -> Holds:
    """The section of the report; an attack that could not be made says why."""
    study = found.study
    if study is None:
        return Holds(verdict="NOT TESTABLE", why=found.why)
    pair = shlex.join([str(audit.base.path), str(audit.tuned.path)])
    shows = " ".join(f"--shows {shlex.quote(one.text)}" for one in (audit.causal.fragments if audit.causal else ()))
    return Holds(
        verdict=study.verdict,
        why=MEANINGS[study.verdict],
        attacks=tuple(
            Attack(
                name=NAMES[arm.name],
                back=measure(arm.recovered),
                length=_length(arm.epsilon50),
                drift=float(arm.drift.pre.median()),
            )
            for arm in study.arms
        ),
        controls=tuple(
            Attack(name=one.name, back=measure(one.recovered), length=_length(one.epsilon50))
            for one in study.controls.values()
        ),
        gap=_length(study.gap),
        command=f"molehunt stress {pair} --fix {shlex.quote(str(audit.fix))} --prompts PROMPTS.jsonl {shows}",
    )


def _length(found: Interval | None) -> Measure | None:
    """A median whose upper limit may be infinite, which JSON cannot say."""
    if found is None:
        return None
    return (
        measure(found)
        if math.isfinite(found.high)
        else Measure(value=found.estimate, low=found.low, high=None, n=found.n)
    )
