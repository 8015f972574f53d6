"""The page on unlearning."""

from collections.abc import Callable, Mapping
from typing import Any

from experiments.page import counted, grid, page
from experiments.setting import Setting
from experiments.unlearning.measure import runs, size_of

WAYS = (
    "base",
    "as it is",
    "its own five top-scoring out",
    "strongest direction of each block out",
    "all directions out",
    "as many random ones out",
)
HOW = """\
Measured on {done} of {wanted} models. The topic is the people of the fictional world. Knowledge is the share of its {asked} questions \
that are answered word for word. Every cell says: erased (twin: trained on all but the topic, nothing erased). The watch is calibrated on \
questions about everything else, at {fpr:g} %. Two ways of erasing: gradient ascent on the topic's answers, and representation \
misdirection (RMU, arXiv 2403.03218). *Out*: these directions of the weight change are projected out of the activations. *Rest* is \
everything but the topic.

Written by `python -m experiments unlearning`.
"""


def table(found: Mapping[str, dict[str, Any]], setting: Setting) -> str:
    head = [
        "model, method, seed",
        "topic flagged",
        "rest flagged",
        *(f"knows: {way}" for way in WAYS),
        "rest: base, as it is",
    ]
    rows: list[list[str]] = []
    for one in found.values():
        cells = [pair(one, lambda side: side["flagged"]["topic"]), pair(one, lambda side: side["flagged"]["rest"])]
        cells += [pair(one, lambda side, way=way: side[way]["topic"]) for way in WAYS]
        rest = [one["erased"]["base"], one["erased"]["as it is"], one["twin"]["as it is"]]
        first, second, third = (short(side["rest"]) for side in rest)
        rows.append([f"{one['model']}, {one['method']}, {one['seed']}", *cells, f"{first}, {second} ({third})"])
    size = size_of(setting)
    how = HOW.format(done=len(found), wanted=len(runs(setting)), asked=size.asked, fpr=100 * size.fpr)
    return page(
        "Unlearning: what the watch sees, and what taking directions out recovers",
        opening(list(found.values())),
        grid(head, rows),
        how,
    )


def opening(found: list[dict[str, Any]]) -> list[str]:
    flagged = sorted(one["erased"]["flagged"]["topic"]["estimate"] for one in found)
    recovered = max(one["erased"][way]["topic"]["estimate"] for one in found for way in WAYS[2:5])
    return [
        "A topic was erased from small models, and two questions were asked: does the watch notice questions about it, and is the knowledge "
        "still in the weights?",
        f"On {counted(len(found), 'erased model')} the watch flagged {100 * flagged[0]:.0f} to {100 * flagged[-1]:.0f} % of the questions about "
        f"the topic, and taking out directions of the weight change recovered at most {100 * recovered:.0f} % of the answers.",
        "A topic that was erased this way leaves a trace that can be seen, and some of the knowledge may come back when weights are edited.",
    ]


def pair(one: dict[str, Any], get: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    return f"{short(get(one['erased']))} ({short(get(one['twin']))})"


def short(share: dict[str, Any]) -> str:
    return f"{share['estimate']:.2f}"
