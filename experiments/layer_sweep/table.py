"""The page of the layer sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from experiments.layer_sweep.measure import size_of, sweep_of
from experiments.page import counted, page
from experiments.setting import Setting
from molehunt.measure.interval import Interval
from molehunt.steer.sweep import SweptRole

HOW = """\
Activations at the trigger's tokens are patched (all of them, those that the look-alike shares included), one block after the \
other, on {rows} triggered prompts and the same tasks under a look-alike of as many tokens, which does not trigger the \
behaviour. Shares are of the triggered prompts that show the behaviour, with 95 % intervals (Clopper-Pearson).

- **removed**: the share that loses the behaviour when patched with the look-alike's activations.
- **noise**, the control: the same tokens are displaced as far in random directions. Where noise removes as much, the behaviour \
is fragile and the patch proves little.
- **induced**: the share of look-alike prompts that show the behaviour when given the trigger's activations.
- Removing the trigger from the text is the trivial baseline. It leaves what the share of look-alike prompts says.
- The *last steerable block* removes .9 of what the best one does, and more than noise does there. Where there is none, the \
tokens behind the trigger have read it before the first block puts anything out.

**Single positions.** The same patch is made at one position at a time, on {position_rows} of the triggered prompts: at the \
trigger's tokens alone (or by twos, where many differ), the first token behind the trigger, the last prompt token, where the \
answer begins, and all others behind at once. Tokens in front of the first that differs from the look-alike's are left out, \
because they have read nothing of it. A position *carries* the behaviour out of a block where patching it alone takes the \
behaviour away, and noise of the same norm there does less, the intervals apart. The one that takes most is named. *induced* says \
whether that position alone is enough, too. Where none is named, several may carry it, each enough without the others. Out of \
the last block only the last prompt token is read, for the first token of the answer. A behaviour that comes later in an answer \
looks back at the trigger through the cache, and has no carrier there.

Written by `python -m experiments layer-sweep`.
"""


def table(found: Mapping[str, dict[str, Any]], setting: Setting) -> str:
    whole = {name: one for name, one in found.items() if not name.startswith("positions/")}
    lines: list[str] = []
    for one in whole.values():
        lines += blocks(one)
    lines += by_position([one for name, one in found.items() if name.startswith("positions/")])
    return page("The layer sweep", opening(list(whole.values())), lines, HOW.format(**asdict(size_of(setting))))


def opening(found: Sequence[dict[str, Any]]) -> list[str]:
    swept = [one for one in found if "why" not in one]
    last = [sweep_of(one).last_steerable for one in swept]
    steerable = sum(site is not None for site in last)
    return [
        "Replacing the activations at a trigger's tokens shows at which block of a model the trigger can still be undone.",
        f"Of {counted(len(swept), 'planted model')} that could be swept, {steerable} have a block where this removes the "
        "behaviour clearly more often than random noise does.",
        "Take the last such block for a fix at the trigger's tokens; behind it the rest of the prompt has read the trigger.",
    ]


def blocks(one: dict[str, Any]) -> list[str]:
    """The section on one organism."""
    lines = [f"## {one['attack']}, {one['model']}", ""]
    if "why" in one:
        return [*lines, f"Not swept: {one['why']}.", ""]
    last = sweep_of(one).last_steerable
    lines += [
        f"Look-alike: `{one['look-alike']}`. Triggered prompts that show the behaviour: {cell(one['shown'])}; look-alike prompts: "
        f"{cell(one['without_trigger'])}. Last steerable block: {'none' if last is None else last} of L0 to L{one['blocks'] - 1}.",
        "",
        "| block | removed | noise | induced |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| L{block['site']['layer']} | {cell(block['removed'])} | {cell(block['by_noise'])} | {cell(block['induced'])} |"
        for block in one["swept"]
    ]
    return [*lines, ""]


def by_position(found: Sequence[dict[str, Any]]) -> list[str]:
    """The section on single positions."""
    lines = ["## Which token carries it?", ""]
    for one in found:
        sweep = sweep_of(one)
        carriers = [f"{blocks} {role or 'none'}" for blocks, role in sweep.carriers()]
        lines += [f"### {one['attack']}, {one['model']}", "", f"Carried by: {'; '.join(carriers)}.", ""]
        for share in ("removed", "by_noise", "induced"):
            head = " | ".join(f"L{block.site.layer}" for block in sweep.blocks)
            lines += [f"| {share.replace('by_', '')} | {head} |", "|---" * (1 + len(sweep.blocks)) + "|"]
            for role in (SweptRole(role="whole trigger", blocks=sweep.blocks), *sweep.roles):
                cells = (cell(asdict(getattr(block, share))) for block in role.blocks)
                lines.append(f"| {role.role} | {' | '.join(cells)} |")
            lines.append("")
    return lines


def cell(share: dict[str, Any]) -> str:
    found = Interval(**share)
    return f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"
