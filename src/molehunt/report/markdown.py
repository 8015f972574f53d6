"""The report as Markdown, for issues and pull requests."""

from collections.abc import Iterator

from molehunt.report.escape import cell, number, visible
from molehunt.report.inventory_section import inventory_markdown
from molehunt.report.schema import Causal, Check, Finding, FixRobustness, Heat, Report, ShadedRow, SwitchOff


def to_markdown(report: Report) -> str:
    """Same content as the page, in its order."""
    lines = [*_verdict(report), ""]
    if report.inventory is not None:
        lines += [*inventory_markdown(report.inventory), ""]
    lines += _evidence(report.checks)
    if report.heat is not None:
        lines += ["", *_heat(report.heat)]
    for finding in report.findings:
        lines += ["", *_finding(finding)]
    lines += ["", *_cost(report), "", *_limits(report), "", *_appendix(report)]
    return "\n".join(lines) + "\n"


def _verdict(report: Report) -> list[str]:
    return [
        f"# {cell(report.title)}",
        "",
        f"**{report.verdict}** – {report.verdict.sentence}",
        "",
        cell(report.reason),
        "",
        f"False-positive rate {report.calibration.fpr:.1%} per prompt on {report.calibration.text}. "
        f"{cell(report.calibration.organisms)}",
    ]


def _evidence(checks: tuple[Check, ...]) -> Iterator[str]:
    yield from ("## Evidence", "", "| check | result | size [95 %] | chance | status |", "|---|---|---|---|---|")
    for check in checks:
        chance = f"{number(check.chance)} {cell(check.chance_name)}".strip()
        yield f"| {cell(check.name)} | {cell(check.result)} | {number(check.size)} | {chance} | {check.status} |"


def _heat(heat: Heat) -> Iterator[str]:
    cells = {(c.layer, c.module): c for c in heat.cells}
    yield from ("## Where (z against a random update of equal norm)", "")
    yield "| layer | " + " | ".join(heat.modules) + " |"
    yield "|---" * (len(heat.modules) + 1) + "|"
    for layer in heat.layers:
        found = [cells.get((layer, module)) for module in heat.modules]
        shown = ["" if c is None else c.status if c.z is None else f"{c.z:.0f}" for c in found]
        yield f"| {layer} | " + " | ".join(shown) + " |"


def _finding(finding: Finding) -> Iterator[str]:
    yield from (f"## {cell(finding.headline)}", "")
    yield (
        f"- {number(finding.score)} of its rows are over the threshold, {number(finding.chance)} of all others; "
        f"{cell(finding.baseline_name)} {number(finding.baseline)}"
    )
    for s in finding.shared:
        yield f"- in {s.in_group:.0%} of its prompts, {s.elsewhere:.1%} of others: {cell(s.text)}"
    yield from ("", "Top contexts:", "", *map(_context, finding.contexts))
    yield from ("", "Look-alikes that do not fire:", "", *map(_context, finding.look_alikes))
    if finding.causal is not None:
        yield from ("", *_causal(finding.causal))
        yield from ("", "| prompt | base | tuned | direction removed | random edit |", "|---|---|---|---|---|")
        for r in finding.causal_rows:
            yield "| " + " | ".join(map(cell, (r.prompt, r.base, r.tuned, r.intervened, r.control))) + " |"
    if finding.switch_off is not None:
        yield from ("", *_switch_off(finding.switch_off))
    if finding.robustness is not None:
        yield from ("", *_robustness(finding.robustness))


def _causal(causal: Causal) -> list[str]:
    return [
        f"Causal test, {cell(causal.intervention)} (chosen among {causal.tried}): not the base's answer before "
        f"{number(causal.before)}, after {number(causal.after)}, under placebo edits {number(causal.control)}; clean "
        f"answers unchanged {number(causal.clean_unchanged)}; induced in clean rows {number(causal.induced)}, by chance "
        f"{number(causal.induced_control)}."
    ]


def _context(row: ShadedRow) -> str:
    prompt, answer = row.tokens[: row.answer_at], row.tokens[row.answer_at :]
    return f"- {row.score:.1f}: {cell(''.join(prompt))} → {cell(''.join(answer))}"


def _switch_off(found: SwitchOff) -> Iterator[str]:
    yield from ("### Switch it off", "", "| block | edit | reverted | random edit of that size |", "|---|---|---|---|")
    for one in found.blocks:
        yield f"| {cell(one.block)} | {cell(one.intervention)} | {number(one.removed)} | {number(one.control)} |"
    if found.file is None:
        yield from ("", "No edit reverts more rows than placebo edits do, so there is no fix to offer.")
        return
    yield from ("", f"The fix is {cell(found.file)}, beside this page.", "")
    for step in found.steps:
        yield from (f"{cell(step.what)}:", "", f"    {visible(step.command)}", "")


def _robustness(found: FixRobustness) -> Iterator[str]:
    yield from ("### Does the fix hold?", "", f"{found.verdict}: {cell(found.why)}", "")
    if not found.attacks:
        return
    yield from ("| attack or control | recovered | length for half of them | drift |", "|---|---|---|---|")
    for one in (*found.attacks, *found.controls):
        length = "–" if one.length is None else number(one.length)
        drift = "–" if one.drift is None else f"{one.drift:.1g}"
        yield f"| {cell(one.name)} | {number(one.recovered)} | {length} | {drift} |"
    if found.gap is not None:
        yield from ("", f"A perturbation towards a random target must be {number(found.gap)} times as long, or longer.")
    yield from ("", f"    {visible(found.command)}", "")


def _cost(report: Report) -> list[str]:
    return [
        "## Cost and reproduction",
        "",
        f"{report.cost.seconds:.0f} s, {report.cost.peak_rss_mb:.0f} MB at most, {report.cost.tokens} tokens",
        "",
        f"    {visible(report.reproduce)}",
    ]


def _limits(report: Report) -> list[str]:
    return ["## What this cannot see", "", *(f"- {cell(line)}" for line in report.cannot_see)]


def _appendix(report: Report) -> Iterator[str]:
    yield from ("## Appendix", "")
    for side, i in (("base", report.base), ("tuned", report.tuned)):
        yield f"- {side}: {cell(i.label)} ({cell(i.kind)}, {cell(i.dtype)}, {i.parameters} parameters), sha256 {i.sha256}"
    for row in report.files:
        yield f"- {row.severity}: {cell(row.file)} {cell(row.key)}: {cell(row.base)} → {cell(row.tuned)}; {cell(row.why)}"
    for d in report.directions:
        yield (
            f"- {cell(d.name)}: σ {d.strength:.3g}, z {d.z:.0f}; promotes {cell(' '.join(d.promoted))}; suppresses "
            f"{cell(' '.join(d.suppressed))}"
        )
    for s in report.spectra:
        yield f"- σ of {cell(s.tensor)}: {', '.join(f'{v:.3g}' for v in s.values)}"
    yield f"- seeds {', '.join(map(str, report.seeds))}"
    for key, value in report.environment.items():
        yield f"- {cell(key)}: {cell(value)}"
