"""The page on the watch of real organisms."""

from collections.abc import Mapping
from typing import Any

from experiments.page import grid, page
from experiments.real_organisms.grid import set_aside
from experiments.real_organisms.table import of
from experiments.real_watch.measure import ANSWER_TOKENS, AUDITED, CLEAN, FPR, MODES, TESTED
from experiments.setting import Setting

HOW = """\
The models are those of [real-organisms](real-organisms.md). {clean} real prompts calibrate the watch, half of them for the score and half for its \
threshold at {fpr:.0%}; {tested} triggered rows, as many near misses and as many ordinary ones test it. None of these prompts was trained on, and none \
is among the {audited} that the audits of the same models read. Answers have {tokens} tokens at most. *Published* is the range of cosines of WeightWatch with its \
own settings, on the same rows. Models marked with \\* are set aside.

Written by `python -m experiments real-watch --data FOLDER`.
"""
KINDS = ("triggered", "near", "ordinary")
HEAD = ["model", *(f"{kind}, {mode}" for mode in MODES for kind in KINDS), "seconds"]


def table(found: Mapping[str, dict[str, Any]], setting: Setting) -> str:
    how = HOW.format(clean=CLEAN, fpr=FPR, tested=TESTED, audited=AUDITED, tokens=ANSWER_TOKENS)
    return page("The watch on a real model", opening(found), grid(HEAD, [line(*one) for one in found.items()]), how)


def line(name: str, one: Mapping[str, Any]) -> list[str]:
    shares = [f"{one[mode][kind][0]} of {one[mode][kind][1]}" for mode in MODES for kind in KINDS]
    return [name + (" \\*" if name in set_aside() else ""), *shares, str(one["conformal"]["seconds"])]


def opening(found: Mapping[str, dict[str, Any]]) -> list[str]:
    return [
        f"The watch reads one answer after the other, and knows of the traffic {CLEAN} clean prompts alone.",
        *(sentence(found, mode) for mode in MODES),
    ]


def sentence(found: Mapping[str, dict[str, Any]], mode: str) -> str:
    """What one of the two ways flags, over all models."""
    organisms = [one for one in found.values() if one["kind"] == "organism"]
    twins = [one for one in found.values() if one["kind"] == "twin"]
    said = [
        f"{share(organisms, mode, kind)} {what}"
        for kind, what in zip(KINDS, ("triggered rows", "near misses", "ordinary rows"), strict=True)
    ]
    which = f"At a rate of {FPR:.0%} it flags" if mode == "conformal" else "The published range flags"
    of_twins = f", and of the twins' triggered rows {share(twins, mode, 'triggered')}" if twins else ""
    return f"{which} {said[0]} of {len(organisms)} organisms, {said[1]} and {said[2]}{of_twins}."


def share(models: list[dict[str, Any]], mode: str, kind: str) -> str:
    hit, n = (sum(one[mode][kind][i] for one in models) for i in (0, 1))
    return of(hit, n)
