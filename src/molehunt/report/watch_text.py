"""The text of a watch: the sentences that all forms of its report share, and the tables of the terminal."""

from collections.abc import Sequence

from molehunt.errors import printable
from molehunt.measure.interval import Interval
from molehunt.report.watch_schema import InputGroup, WatchReport
from molehunt.watch.simulate import MonitorSimulation
from molehunt.watch.suspects import Suspects

IN_TERMINAL = 10
"""Number of flagged rows that the terminal shows."""


def says(report: WatchReport) -> str:
    """The meaning of the verdict in one sentence."""
    share = report.share_flagged
    if share is None:
        return "No row was judged."
    if not report.flagged:
        beyond = "the threshold" if report.mode == "conformal" else "the range that earlier rows showed"
        return f"None of {report.rows} rows is beyond {beyond}. That is no proof that nothing is hidden."
    flagged = f"{report.flagged} of {report.rows} rows are flagged"
    if report.expected is None or report.fpr is None:
        return f"{flagged}, at first sight; the range grows with every row, so no rate says how many clean ones are among them."
    by_chance = f"clean traffic alone would give about {report.expected:.0f}"
    if share.low > report.fpr:
        return f"{flagged}; {by_chance}. Chance alone does not explain that."
    return f"{flagged}; {by_chance}, so look at them before you conclude anything."


def rate(report: WatchReport) -> str:
    """The false-alarm rate, and how it is known."""
    if report.measured is None or report.bound is None:
        return (
            f"The rate of {report.fpr:g} was set on {report.calibration_rows} clean rows: joint over all directions, "
            "answer lengths and prefix checkpoints."
        )
    vacuous = ", which says nothing" if report.bound >= 1 else ""
    return (
        f"No rate is set: of {report.measured.n} held-out clean rows the range flagged {interval(report.measured)}. The "
        f"published bound 2t/n on that is {report.bound:.3g}{vacuous}. Each row, flagged or not, is normal from then on."
    )


def suspects(found: Suspects | None) -> str:
    """Text on clean rows that may contain the behaviour; empty where there are none."""
    if found is None or not found.n:
        return ""
    more = found.n - len(found.rows)
    lines = ", ".join(map(str, sorted(one.line for one in found.rows))) + (f" and {more} more" if more else "")
    shown = (
        f"{found.n} of {found.clean} clean rows have answers that the base would not give ({min(found.limits):.0f} nats or more; "
        "they may contain the very behaviour that the watch is for)"
    )
    if found.trusted:
        return (
            f"{shown}, and are calibrated on, as trust_clean (--trust-clean) requests. The watch flags {found.flagged_with} "
            f"of these {found.n} rows; one that excludes them from calibration flags {found.flagged_without}. Lines: {lines}."
        )
    return (
        f"{shown}, and were excluded from calibration. The watch flags {found.flagged_without} of these {found.n} rows; one "
        f"that is calibrated on them, too, flags {found.flagged_with}. Such rows are flagged in addition to the rate. Lines: "
        f"{lines}. If these are as they should be, give trust_clean (--trust-clean)."
    )


def drift(report: WatchReport) -> str:
    """Whether clean traffic still looks as it did in calibration."""
    found = report.drift
    if found is None:
        return "The published mode has no test of drift: its range takes in whatever comes."
    if found.alarm:
        return "The traffic has drifted from what was calibrated on: the rate no longer holds. Calibrate anew."
    return "No sign that rows which were not flagged have drifted from what was calibrated on."


def shares(group: InputGroup, no_text: bool) -> str:
    """Text of what the rows of a group have in common."""
    if not group.inputs:
        return "no row yet"
    if group.label:
        return group.label
    if group.keywords:
        return ", ".join(f"{one.word} ({one.rows} of {len(group.inputs)})" for one in group.keywords)
    return "no text is kept" if no_text else "no word stands out"


def interval(found: Interval) -> str:
    """`0.0123 [0.0100, 0.0150]`."""
    return f"{found.estimate:.4f} [{found.low:.4f}, {found.high:.4f}]"


def to_text(report: WatchReport, bad: Sequence[str]) -> str:
    """Text for a terminal. `bad` names the first rows that could not be read, with the reason."""
    by_chance = "at first sight"
    if report.expected is not None:
        by_chance = f"clean traffic alone would give about {report.expected:.0f}"
    lines = [
        f"{report.verdict}: {report.flagged} of {report.rows} rows; {by_chance}."
        if report.rows
        else f"Calibrated on {report.calibration_rows} clean rows: threshold {report.threshold:.4g}, nothing judged yet.",
        f"{report.directions} directions watched. {rate(report)}",
    ]
    if excluded := suspects(report.suspects):
        lines.append(printable(excluded, 1000))
    if report.share_flagged is not None:
        lines.append(f"Share flagged {interval(report.share_flagged)}.")
    if report.drift is not None and report.drift.alarm:
        lines.append(drift(report))
    lines += [f"Answers were decoded without a cache: {printable(why, 400)}." for why in report.decoding]
    if report.cut:
        lines.append(f"{report.cut} of {report.rows} prompts were longer than the models read, and were cut.")
    if bad:
        lines += [f"{report.skipped} rows could not be read, the first:", *(f"  {printable(one)}" for one in bad)]
    wide = max((len(one.direction) for one in report.alerts), default=0)
    if report.alerts:
        lines += [
            "",
            f"{'where':<12}{'p':>9}  {'direction':<{wide}}{'token':>7}  the answer, and without the direction",
        ]
    for one in report.alerts[:IN_TERMINAL]:
        p = "–" if one.p_value is None else f"{one.p_value:.2g}"
        lines.append(
            f"{printable(one.request, 40):<12}{p:>9}  {one.direction:<{wide}}{one.span[0]:>7}  {printable(one.answer or '', 60)!r}"
        )
        if one.answer_without is not None:
            lines.append(f"{'':<{32 + wide}}{printable(one.answer_without, 60)!r}")
    shared = [
        f"  {shown.direction}, {end.side}{': ' if group is end.rows else ', flagged rows: '}"
        f"{printable(shares(group, report.no_text), 90)}"
        for shown in report.shown
        for end in shown.ends
        for group in (end.flagged, end.rows)
        if group.keywords or group.label
    ]
    if shared:
        lines += ["", "What inputs at the ends of directions share:", *shared[:IN_TERMINAL]]
    if report.label_error:
        lines += ["", printable(report.label_error, 400)]
    if report.out:
        lines += ["", f"verdicts, flagged rows and watch.html: {report.out}"]
    return "\n".join(lines)


def simulation_text(found: Sequence[MonitorSimulation], fpr: float) -> str:
    """A table for a terminal: both monitors in every order."""
    shown = list(found[0].by_repeat)
    lines = [
        f"Share of attacks flagged at each repeat, and of benign rows, at a rate of {fpr:g}:",
        "",
        f"{'monitor':<36}{'order':<8}" + "".join(f"{f'repeat {n}':>12}" for n in shown) + f"{'benign':>24}",
    ]
    for one in found:
        by_repeat = "".join(f"{one.by_repeat[n].estimate:>12.2f}" for n in shown)
        lines.append(f"{one.monitor:<36}{one.order:<8}{by_repeat}{interval(one.fpr):>24}")
    return "\n".join(lines)
