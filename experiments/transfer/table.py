"""The page on patches carried from model to model."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.page import counted, page
from experiments.setting import Setting
from experiments.transfer.measure import size_of
from molehunt.measure.interval import Interval

HOW = """\
Both models have the same planted behaviour, learnt independently. At the trigger's tokens of {rows} prompts, the target's \
activations are replaced at its last steerable block: by its own under a look-alike (*native*), or by those that a ridge map \
makes of the source's at the source's last steerable block. Blocks were chosen by the [layer sweep](layer-sweep.md), on other \
rows. The map was fitted to {fit:,} other texts, half of them triggered ones with the behaviour, and its penalty was chosen on \
{held_out} more. *Difference alone* adds what the map makes of the source's difference, and leaves the rest of the activation as \
it is.

- **safe**: of the prompts that show the behaviour, the share that no longer does. *Steerable* prompts are those that the native \
patch makes safe.
- **answer of the look-alike**: a safe answer may still be nonsense, so this column counts answers that equal, token for token, \
those to the look-alike prompt.
- **The shuffled map** is fitted to texts that do not belong together, and knows nothing but means. Where replacing by it does as \
well, any ordinary activation at those tokens would have done, and the success of the replacement says nothing about the map. \
The rows of the difference alone do.
- Intervals are 95 % (Clopper-Pearson). *As native*: the difference from native in points, with its 90 % interval, and whether \
two one-sided tests call it within ±5 points.

Written by `python -m experiments transfer`.
"""


def table(found: Mapping[str, dict[str, Any]], setting: Setting) -> str:
    lines: list[str] = []
    for one in found.values():
        lines += section(one)
    size = size_of(setting)
    how = HOW.format(rows=size.rows, fit=size.fit, held_out=size.held_out)
    return page("Patches carried from model to model", opening(list(found.values())), lines, how)


def opening(found: Sequence[dict[str, Any]]) -> list[str]:
    ways = [one["ways"] for one in found if "why" not in one]
    equal = sum(way["mapped"]["safe as native"]["p_value"] < 0.05 for way in ways)
    random = sum(way["shuffled map"]["safe"]["high"] >= way["mapped"]["safe"]["low"] for way in ways)
    return [
        "A patch that removes a planted behaviour in one model was carried to another model through a linear map between their "
        "activations.",
        f"In {equal} of {counted(len(ways), 'pair')} of models it removed the behaviour as often as the target's own patch, within "
        f"5 points; in {random} a map that knows nothing but means did not differ from it measurably.",
        "Do not take a success of replacing activations as proof that a map carries meaning: compare it with the shuffled map "
        "first.",
    ]


def section(one: dict[str, Any]) -> list[str]:
    lines = [f"## {one['attack']}: {one['source']} to {one['target']}", ""]
    if "why" in one:
        return [*lines, f"Not measured: {one['why']}.", ""]
    lines += [
        f"{one['sites'][0]} to {one['sites'][1]}; {one['tokens']:,} aligned tokens read and fitted in {one['seconds']:.1f} s; held-out FVU "
        f"{one['fvu']:.3f} (shuffled map {one['fvu of the shuffled map']:.2f}). Prompts that show the behaviour: {cell(one['shown'])}.",
        "",
        "| activations | safe | of steerable | answer of the look-alike | safe as native | the same answers as native |",
        "|---|---|---|---|---|---|",
    ]
    for name, way in one["ways"].items():
        cells = [cell(way[column]) for column in ("safe", "of steerable", "as the look-alike's answer")]
        cells += [tost(way[column]) if name != "native" else "–" for column in ("safe as native", "same as native")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def cell(share: dict[str, Any] | None) -> str:
    if share is None:
        return "none steerable"
    found = Interval(**share)
    return f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]"


def tost(test: dict[str, Any]) -> str:
    found = Interval(**test["difference"])
    result = "equivalent" if test["p_value"] < 0.05 else "not shown"
    return f"{100 * found.estimate:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}], {result}"
