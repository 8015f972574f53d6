"""An audit with a plan that is smaller than any that the command offers, for runs of quick size."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from molehunt.audit.plan import plan_named
from molehunt.audit.result import AuditConfig
from molehunt.audit.run import run_audit
from molehunt.report.build import build_report
from molehunt.traffic.example import Example
from molehunt.workflows.audit import AuditResult
from molehunt.workflows.models import open_models

SMALL = replace(
    plan_named("quick"),
    clean_prompts=200,
    max_new_tokens=12,
    max_sites=2,
    directions=2,
    confirm_rows=4,
    random_controls=1,
    stress_rows=2,
    stress_steps=4,
)


def small_audit(base: Path, tuned: Path, rows: Sequence[Example], out: Path) -> AuditResult:
    """Audit a pair of folders, and write the report to `out`."""
    found = run_audit((base, tuned), lambda: open_models(base, tuned).pair, rows, AuditConfig(plan=SMALL), out=out)
    result = AuditResult(found, build_report(found, title=tuned.name, command="python -m experiments verdicts --quick"))
    result.save()
    return result
