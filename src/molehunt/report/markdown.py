"""The report as Markdown, for issues and pull requests."""

import re

from molehunt.report.schema import Context, Holds, Measure, Report, SwitchOff
from molehunt.report.visible import visible


def number(measure: Measure | None) -> str:
    """`0.93 [0.86, 0.97]`, or a dash."""
    if measure is None:
        return "–"
    if measure.low is None or measure.high is None:
        return f"{measure.value:.2f}"
    return f"{measure.value:.2f} [{measure.low:.2f}, {measure.high:.2f}]"


def cell(text: str) -> str:
    """Text that cannot leave its table cell, start markup or be read as HTML."""
    flat = visible(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|`*_\[\]#!~])", r"\\\1", flat)


def to_markdown(report: Report) -> str:
    """Same content as the page, in its order."""
    lines = [
        f"# {cell(report.title)}",
        "",
        f"**{report.verdict}** – {report.verdict.sentence}",
        "",
        cell(report.reason),
        "",
        f"False-positive rate {report.calibration.fpr:.1%} per prompt on {report.calibration.n_clean} clean prompts. "
        f"{cell(report.calibration.organisms)}",
        "",
        "## Evidence",
        "",
        "| check | result | size [95 %] | chance | status |",
        "|---|---|---|---|---|",
    ]
    for check in report.checks:
        chance = f"{number(check.chance)} {cell(check.chance_name)}".strip()
        lines.append(
            f"| {cell(check.name)} | {cell(check.result)} | {number(check.size)} | {chance} | {check.status} |"
        )
    if report.heat is not None:
        zs = {(c.layer, c.module): c for c in report.heat.cells}
        lines += ["", "## Where (z against a random update of equal norm)", ""]
        lines += ["| layer | " + " | ".join(report.heat.modules) + " |", "|---" * (len(report.heat.modules) + 1) + "|"]
        for layer in report.heat.layers:
            found = [zs.get((layer, module)) for module in report.heat.modules]
            lines.append(
                f"| {layer} | "
                + " | ".join("" if c is None else c.status if c.z is None else f"{c.z:.0f}" for c in found)
                + " |"
            )
    for finding in report.findings:
        lines += ["", f"## {cell(finding.headline)}", ""]
        lines += [
            f"- {number(finding.score)} of its rows are over the threshold, {number(finding.chance)} of all others; "
            f"{cell(finding.baseline_name)} {number(finding.baseline)}"
        ]
        lines += [
            f"- in {s.in_group:.0%} of its prompts, {s.elsewhere:.1%} of others: {cell(s.text)}" for s in finding.shared
        ]
        lines += ["", "Top contexts:", "", *(_context(c) for c in finding.contexts)]
        lines += ["", "Look-alikes that do not fire:", "", *(_context(c) for c in finding.look_alikes)]
        if finding.causal is not None:
            causal = finding.causal
            lines += [
                "",
                f"Causal test, {cell(causal.intervention)} (chosen among {causal.tried}): not the base's answer before "
                f"{number(causal.before)}, after {number(causal.after)}, under random edits {number(causal.control)}; clean "
                f"answers unchanged {number(causal.clean_kept)}; brought to clean rows {number(causal.brought)}, by chance "
                f"{number(causal.brought_control)}.",
                "",
                "| prompt | base | tuned | direction removed | random edit |",
                "|---|---|---|---|---|",
            ]
            lines += [
                "| " + " | ".join(cell(t) for t in (r.prompt, r.base, r.tuned, r.intervened, r.control)) + " |"
                for r in finding.causal_rows
            ]
        if finding.switch_off is not None:
            lines += ["", *_switch_off(finding.switch_off)]
        if finding.holds is not None:
            lines += ["", *_holds(finding.holds)]
    lines += ["", "## Cost and reproduction", ""]
    lines += [
        f"{report.cost.seconds:.0f} s, {report.cost.peak_rss_mb:.0f} MB at most, {report.cost.tokens} tokens",
        "",
        f"    {visible(report.reproduce)}",
        "",
        "## What this cannot see",
        "",
        *(f"- {cell(line)}" for line in report.cannot_see),
        "",
        "## Appendix",
        "",
    ]
    lines += [
        f"- {side}: {cell(i.label)} ({cell(i.kind)}, {cell(i.dtype)}, {i.parameters} parameters), sha256 {i.sha256}"
        for side, i in (("base", report.base), ("tuned", report.tuned))
    ]
    lines += [
        f"- {row.severity}: {cell(row.file)} {cell(row.key)}: {cell(row.base)} → {cell(row.tuned)}; {cell(row.why)}"
        for row in report.files
    ]
    lines += [
        f"- {cell(d.name)}: σ {d.strength:.3g}, z {d.z:.0f}; promotes {cell(' '.join(d.promoted))}; suppresses "
        f"{cell(' '.join(d.suppressed))}"
        for d in report.directions
    ]
    lines += [f"- σ of {cell(s.tensor)}: {', '.join(f'{v:.3g}' for v in s.values)}" for s in report.spectra]
    lines += [f"- seeds {', '.join(map(str, report.seeds))}"]
    lines += [f"- {cell(key)}: {cell(value)}" for key, value in report.environment.items()]
    return "\n".join(lines) + "\n"


def _context(context: Context) -> str:
    prompt, answer = context.tokens[: context.answer_at], context.tokens[context.answer_at :]
    return f"- {context.score:.1f}: {cell(''.join(prompt))} → {cell(''.join(answer))}"


def _switch_off(found: SwitchOff) -> list[str]:
    lines = ["### Switch it off", "", "| block | edit | moved back | random edit of that size |", "|---|---|---|---|"]
    lines += [
        f"| {cell(one.block)} | {cell(one.intervention)} | {number(one.removed)} | {number(one.control)} |"
        for one in found.blocks
    ]
    if found.file is None:
        return [*lines, "", "No edit moves more rows back than random edits of its size, so there is no fix to offer."]
    lines += ["", f"The fix is {cell(found.file)}, beside this page.", ""]
    for step in found.steps:
        lines += [f"{cell(step.what)}:", "", f"    {visible(step.command)}", ""]
    return lines


def _holds(found: Holds) -> list[str]:
    lines = ["### Does the fix hold?", "", f"{found.verdict}: {cell(found.why)}", ""]
    if not found.attacks:
        return lines
    lines += ["| attack or control | brought back | length for half of them | drift |", "|---|---|---|---|"]
    for one in (*found.attacks, *found.controls):
        length = "–" if one.length is None else number(one.length)
        drift = "–" if one.drift is None else f"{one.drift:.1g}"
        lines.append(f"| {cell(one.name)} | {number(one.back)} | {length} | {drift} |")
    if found.gap is not None:
        lines += ["", f"A push to a random target must be {number(found.gap)} times as long, or longer."]
    return [*lines, "", f"    {visible(found.command)}", ""]
