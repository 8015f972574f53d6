"""The text of a watch: the sentences that all forms of its report share, and the tables of the terminal."""

import math
from collections.abc import Sequence

from molehunt.errors import printable
from molehunt.measure.interval import Interval
from molehunt.report.watch_schema import Flagged, InputGroup, SharedWords, WatchReport
from molehunt.run.counting import counted
from molehunt.watch.ends import FEWEST_TEXTS
from molehunt.watch.simulate import MonitorSimulation
from molehunt.watch.suspects import Suspects

IN_TERMINAL = 10
"""Number of flagged rows, and of words and of groups at the ends of directions, that the terminal shows."""
WORDS_TITLE = "Words that inputs at the ends of directions share"
CANDIDATES = (
    "These words are candidates to test, no accusation: the directions of a harmless fine-tune separate topics, too. They "
    "flag no row and change no verdict. Next: put the words into other prompts and see whether the answers leave the base's. "
    "`molehunt audit` on the same log tests words in this way."
)


def says(report: WatchReport) -> str:
    """The meaning of the verdict in one sentence."""
    share = report.share_flagged
    if share is None:
        return "No row was judged."
    if not report.flagged:
        beyond = "the threshold" if report.mode == "conformal" else "the range that earlier rows showed"
        return f"None of {counted(report.rows, 'row')} is beyond {beyond}. That is no proof that nothing is hidden."
    flagged = f"{report.flagged} of {counted(report.rows, 'row')} {'is' if report.flagged == 1 else 'are'} flagged"
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
            f"The rate of {report.fpr:g} was set on {counted(report.calibration_rows, 'clean row')}: joint over all directions, "
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
    said = (
        f"{found.n} of {counted(found.clean, 'clean row')} {_have(found.n)} answers that the base would not give "
        f"(log ratio above {min(found.limits):.0f} nats). They may contain the very behaviour that the watch is for"
    )
    if found.trusted:
        return (
            f"{said}. The watch is calibrated on them all the same, as trust_clean (--trust-clean) asks, and flags "
            f"{found.flagged_with} of the {found.n}; calibrated without them, it would flag {found.flagged_without}. "
            f"Lines: {lines}."
        )
    return (
        f"{said}, so the watch is not calibrated on them. It flags {found.flagged_without} of the {found.n}; calibrated on "
        f"them, too, it would flag {found.flagged_with}. Rows like these are flagged in addition to the rate. Lines: {lines}. "
        "If they are as they should be, calibrate on them with trust_clean (--trust-clean)."
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


def end_words(report: WatchReport) -> str:
    """What was compared to find words at the ends of directions, and whether any stand out."""
    found = report.end_words
    if report.no_text:
        return "No text is kept, so words at the ends of directions are not compared."
    if found.prompts < FEWEST_TEXTS:
        return f"Fewer than {FEWEST_TEXTS} distinct prompts are too few to compare the words at the ends of directions."
    compared = f"among {found.prompts} distinct prompts"
    if not found.found:
        return f"No words stand out at the ends of directions beyond chance, {compared}."
    more = f" At least {found.more} more {'is' if found.more == 1 else 'are'} not listed." if found.more else ""
    return (
        f"{compared[0].upper()}{compared[1:]}, a repeated one counted once. p is the share of permutations of the prompts, "
        "among those of like length, in which any words at any end of any direction stand out as much. First come the words "
        "that clean rows have least often."
        f"{more}"
    )


def where_shared(one: SharedWords) -> str:
    """In how many of the furthest inputs of which directions the words stand, and in how many prompts at all."""
    ends = ", ".join(f"{end.rows} of {end.of} at {end.direction} {end.side}" for end in one.ends)
    more = one.n_ends - len(one.ends)
    return f"{ends}{f' and at {more} more ends' if more > 1 else ' and at 1 more end' if more else ''}"


def interval(found: Interval) -> str:
    """`0.0123 [0.0100, 0.0150]`."""
    return f"{found.estimate:.4f} [{found.low:.4f}, {found.high:.4f}]"


def answers_from(report: WatchReport) -> str:
    """Where the judged answers are from; empty where no row was judged, or where older versions judged some."""
    if not report.rows or report.logged + report.generated != report.rows:
        return ""
    return f"{counted(report.logged, 'answer')} came from the log, and {report.generated} {_was(report.generated)} generated."


def smallest_p(report: WatchReport) -> str:
    """Which of the shown p-values are the smallest that the clean rows allow; empty where none is."""
    least = sorted(
        {one.p_value for one in report.alerts if one.p_value is not None and _is_smallest(report, one.p_value)}
    )
    if not least:
        return ""
    each = [f"{p:.2g} with {counted(round(1 / p) - 1, 'clean row')}" for p in least]
    return (
        f"The smallest p that the clean rows of a stratum allow: {', '.join(each)}. More clean rows allow smaller ones."
    )


def to_text(report: WatchReport) -> str:
    """Text for a terminal."""
    by_chance = "at first sight"
    if report.expected is not None:
        by_chance = f"clean traffic alone would give about {report.expected:.0f}"
    lines = [
        f"{report.verdict}: {report.flagged} of {counted(report.rows, 'row')}; {by_chance}."
        if report.rows
        else f"Calibrated on {counted(report.calibration_rows, 'clean row')}: threshold {report.threshold:.4g}, nothing "
        "judged yet."
    ]
    lines += [printable(report.reading, 1500)] if report.reading else []
    lines += [where] if (where := answers_from(report)) else []
    lines.append(f"{counted(report.directions, 'direction')} watched. {rate(report)}")
    if excluded := suspects(report.suspects):
        lines.append(printable(excluded, 1000))
    if report.share_flagged is not None:
        lines.append(f"Share flagged {interval(report.share_flagged)}.")
    if report.drift is not None and report.drift.alarm:
        lines.append(drift(report))
    lines += [f"Answers were decoded without a cache: {printable(why, 400)}." for why in report.decoding]
    if report.cut:
        lines.append(
            f"{report.cut} of {counted(report.rows, 'prompt')} {_was(report.cut)} longer than the models read, and cut."
        )
    lines += [*_flagged_rows(report), *_shared(report), *_end_words(report)]
    if report.label_error:
        lines += ["", printable(report.label_error, 400)]
    if report.out:
        lines += ["", f"verdicts, flagged rows and watch.html: {report.out}"]
    return "\n".join(lines)


def _flagged_rows(report: WatchReport) -> list[str]:
    """A table of the top-scoring flagged rows, with the answers of each one below the other."""
    if not report.alerts:
        return []
    wide = max(len(one.direction) for one in report.alerts)
    lines = ["", f"{'where':<12}{'p':>9}{'score':>9}  {'direction':<{wide}}{'token':>7}  answers"]
    for one in report.alerts[:IN_TERMINAL]:
        p = "–" if one.p_value is None else "min" if _is_smallest(report, one.p_value) else f"{one.p_value:.2g}"
        start = f"{printable(one.request, 40):<12}{p:>9}{one.score:>9.3g}  {one.direction:<{wide}}{one.span[0]:>7}  "
        for name, answer in answers_of(one):
            lines.append(f"{start}{name + ':':<24}{printable(answer, 60)!r}")
            start = " " * len(start)
    lines.append("")
    if said := smallest_p(report):
        lines.append(f"min: {said[0].lower()}{said[1:]}")
    lines.append(
        "token: place of the top-scoring token, counted from 0 through the prompt, with its template, and the answer."
    )
    return lines


def answers_of(one: Flagged) -> list[tuple[str, str]]:
    """The answers to one flagged row, each with what it is: the judged one first."""
    judged = "logged answer" if one.logged else "the model's answer"
    found = [(judged, one.answer or "")]
    found += [("the model's own answer", one.answer_own)] if one.answer_own is not None else []
    return found + ([("without the direction", one.answer_without)] if one.answer_without is not None else [])


def _shared(report: WatchReport) -> list[str]:
    """What the rows at the ends of directions have in common."""
    shared = [
        f"  {shown.direction}, {end.side}{': ' if group is end.rows else ', flagged rows: '}"
        f"{printable(shares(group, report.no_text), 90)}"
        for shown in report.shown
        for end in shown.ends
        for group in (end.flagged, end.rows)
        if group.keywords or group.label
    ]
    if not shared:
        return []
    title = "What inputs at the ends of directions share (1 group in 20 shares a word by chance):"
    return ["", title, *shared[:IN_TERMINAL]]


def _end_words(report: WatchReport) -> list[str]:
    """The words that inputs at the ends of directions share beyond chance, and what to do with them."""
    found = report.end_words
    if not found.found:
        return []
    listed = [
        f"  {printable(one.text, 60)!r} (in {one.rows} of {found.prompts} prompts and {one.clean} of {found.clean_rows} "
        f"clean rows, p {one.p_value:.2g}): {printable(where_shared(one), 240)}"
        for one in found.found[:IN_TERMINAL]
    ]
    hidden = len(found.found) - len(listed)
    listed += [f"  … and {hidden} more on the page"] if hidden else []
    return ["", f"{WORDS_TITLE}:", *listed, end_words(report), CANDIDATES]


def _is_smallest(report: WatchReport, p: float) -> bool:
    return any(math.isclose(p, least, rel_tol=1e-4) for least in report.smallest_p)


def _have(n: int) -> str:
    return "has" if n == 1 else "have"


def _was(n: int) -> str:
    return "was" if n == 1 else "were"


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
