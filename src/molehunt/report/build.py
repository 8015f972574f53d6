"""From what an audit measured to the report, and the report as text for a terminal."""

import json
import platform
from textwrap import wrap

import torch

from molehunt import __version__
from molehunt.audit.judge import CANNOT_SEE, calibration_in_words, judge
from molehunt.audit.result import Audit
from molehunt.audit.verdict import Verdict
from molehunt.checkpoint.links import model_name
from molehunt.errors import printable, terminal_text
from molehunt.report import schema
from molehunt.report.escape import CUT
from molehunt.report.evidence import checks
from molehunt.report.finding_section import findings
from molehunt.report.inventory_section import answer_inventory, broad_change, condition_in_words, summary_sentence
from molehunt.report.template_section import only_under, template_use
from molehunt.report.weight_section import direction_cards, heat, spectra

LISTED = 5
"""Greatest number of behaviours that the terminal lists; the page has all of them."""


def build_report(audit: Audit, *, title: str, command: str) -> schema.Report:
    """The report of one audit.

    Args:
        audit: what was measured.
        title: headline of the page.
        command: the command that repeats the audit.
    """
    verdict, reason = judge(
        audit.candidates,
        audit.causal,
        audit.hidden,
        files_flagged=audit.files.verdict == Verdict.FLAGGED_CORRELATIONAL,
        n_rows=len(audit.traffic.rows),
    )
    if only := only_under(audit):
        reason += f" It shows {only}."
    if verdict == Verdict.NO_FINDING:
        reason += broad_change(audit.inventory)
    if verdict == Verdict.NO_FINDING and audit.reference.assumption:
        reason += f" No clean rows set the threshold, but the traffic itself: {audit.reference.assumption}."
    return schema.Report(
        title=title,
        base=_input(audit, "base"),
        tuned=_input(audit, "tuned"),
        verdict=verdict,
        reason=reason,
        calibration=schema.Calibration(
            text=audit.reference.text,
            n_clean=len(audit.reference.scan.rows) - len(audit.reference.excluded),
            fpr=audit.reference.fpr,
            threshold=audit.candidates.threshold,
            organisms=calibration_in_words(),
        ),
        findings=findings(audit),
        checks=checks(audit),
        heat=heat(audit),
        directions=direction_cards(audit),
        spectra=spectra(audit),
        files=tuple(
            schema.FileRow(file=r.file, key=r.key, base=r.base, tuned=r.tuned, severity=r.severity, why=r.why)
            for r in audit.files.rows
        ),
        cost=schema.Cost(seconds=round(audit.seconds, 1), peak_rss_mb=round(audit.peak_rss_mb, 1), tokens=audit.tokens),
        reproduce=command,
        cannot_see=CANNOT_SEE,
        environment={
            "molehunt": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "threads": str(torch.get_num_threads()),
            "device": str(audit.pair.device),
            "plan": audit.config.plan.name,
        },
        seeds=(audit.config.seed,),
        templates=template_use(audit),
        inventory=answer_inventory(audit),
        traffic=schema.TrafficCount(
            rows=len(audit.traffic.rows),
            left_out=audit.left_out_rows,
            cut=audit.cut_rows,
            beyond_trained_length=audit.beyond_rows,
            note=audit.reading,
        ),
    )


def _input(audit: Audit, side: str) -> schema.ReportInput:
    checkpoint = audit.base if side == "base" else audit.tuned
    dtypes = sorted({str(checkpoint.dtype(name)).removeprefix("torch.") for name in checkpoint.names()})
    return schema.ReportInput(
        label=model_name(checkpoint.path),
        kind=checkpoint.kind,
        sha256=checkpoint.content_hash(),
        dtype=", ".join(dtypes),
        parameters=sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names()),
    )


def _inventory(report: schema.Report) -> list[str]:
    """What the fine-tune does, a few lines."""
    found = report.inventory
    if found is None:
        return []
    lines = [f"What it does: {summary_sentence(found)}"]
    for one in found.behaviours[:LISTED]:
        words = printable(json.dumps(one.wording, ensure_ascii=False), CUT)
        depends = printable(condition_in_words(one.condition), CUT)
        lines.append(f"  {one.kind}: {one.rows} rows, {one.base_rows} of the base's: {words}; condition: {depends}")
    return [*lines, ""]


def summary(report: schema.Report) -> str:
    """The text that the terminal shows: verdict, evidence table, and what the finding's prompts share."""
    lines = [f"{report.verdict}: {report.reason}", "", *_inventory(report)]
    wide = max((len(check.name) for check in report.checks), default=0) + 2
    lines.append(f"{'check':<{wide}}{'size [95 %]':>22}{'chance':>9}  status")
    for check in report.checks:
        size = check.size
        shown = "" if size is None else f"{size.value:.2f} [{size.low or 0:.2f}, {size.high or 0:.2f}]"
        chance = "" if check.chance is None else f"{check.chance.value:.2f}"
        lines.append(f"{check.name:<{wide}}{shown:>22}{chance:>9}  {check.status}")
        if check.name == "traffic":
            lines += wrap(check.result, 110, initial_indent="  ", subsequent_indent="  ")
    if report.templates is not None:
        lines += ["", f"Both models were prompted with {printable(report.templates.used, CUT)}."]
        if report.templates.difference:
            lines.append(f"  base's text and fine-tune's text: {printable(report.templates.difference, CUT)}")
    for finding in report.findings:
        lines += ["", printable(finding.headline, CUT)]  # on one line: text of a model could forge a verdict below it
        lines += [
            f"  in {s.in_group:.0%} of these prompts and {s.elsewhere:.1%} of the others: {json.dumps(s.text, ensure_ascii=False)}"
            for s in finding.shared
        ]
    return terminal_text("\n".join(lines))
