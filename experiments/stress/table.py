"""The page of the stress tests."""

from collections.abc import Mapping
from typing import Any

from experiments.page import counted, grid, page
from experiments.setting import Setting
from experiments.stress.choice_section import choices
from experiments.stress.refusal_section import refusal
from experiments.stress.sections import ARMS, cell
from experiments.stress.tpp_section import tpp

SECTIONS = {"tpp": tpp, "refusal": refusal}
"""The section by how the name of a run begins; the other runs are choices between tokens."""
HOW = """\
A model is taught a behaviour, a clamp on latents of a dictionary takes it away, and a perturbation δ behind the clamp, at the last \
prompt token, recovers it. Protocol and settings are those of arXiv 2606.18322, on models that are embedded here; what that paper \
leaves out is added.

- **One judge**, before and after: valid rows show the behaviour without the clamp, not under it, and their greedy token under it is \
still an answer (a name; an answer of its kind). Flipped rows whose token is none are *broken*, and left out. *δ = 0* is measured.
- **Lengths** are in units of the median ‖h‖ at the site, without the clamp. *As published*: one ball of 1 for every row, all steps, \
the published step size. *Shortest*: bisection for each row, up to 8; ε50 is where half of the clusters are recovered.
- **Drift of S**: relative change of the clamped latents' pre-activations (median and largest row), and of their codes behind the \
threshold, as published (median of rows where any of S fires at all; the rest is *silent*, where the published number says 0 whatever \
happens). *Reactivated* is the share of silent latents of S that fire under attack.
- **Controls** belong to the shortest exact arm. The random target is asked for in the same way, at most as far as the row itself took; \
*gap* is how many times longer its own shortest perturbation is. *Gain* is how many times longer the perturbation is than one that \
flips a row without the clamp.
- Limits are 95 %, by bootstrap or order statistics over clusters; where all rows agree, exact ones of as many trials as there are clusters.
- *Verdict*: RECOVERABLE where the exact arm does more than random perturbations and the gap is above 1; OVERRIDDEN where it is below 1: \
a random target takes less; UNDECIDED where its limits contain 1. Nothing here says that a clamp is safe.

Written by `python -m experiments stress`.
"""


def table(found: Mapping[str, dict[str, Any]], setting: Setting) -> str:
    del setting  # the page has no number that depends on it
    lines = summary(found)
    for name, one in found.items():
        lines += next((write for kind, write in SECTIONS.items() if name.startswith(kind)), choices)(name, one)
    return page("Past the clamp", opening(found), lines, HOW)


def opening(found: Mapping[str, dict[str, Any]]) -> list[str]:
    every = [study for name, one in found.items() for _, study in studies(name, one)]
    whole = sum(study["published"]["exact"]["recovered"]["estimate"] >= 0.9 for study in every)
    verdicts = [study["verdict"] for study in every]
    overridden = verdicts.count("OVERRIDDEN")
    return [
        "Clamping the dictionary latents that belong to a behaviour suppresses it, and a small perturbation behind the clamp was searched "
        "that recovers it.",
        f"In {whole} of {counted(len(every), 'test')} the published attack recovered the behaviour in nine of ten rows or more without moving "
        f"the clamped latents; in {overridden} a random target was reached with less, so that the clamp was overridden rather than bypassed.",
        "Do not take a clamp on dictionary latents for removal: use it to study a behaviour, not to guarantee its absence.",
    ]


def summary(found: Mapping[str, dict[str, Any]]) -> list[str]:
    rows: list[list[str]] = []
    for name, one in found.items():
        for label, study in studies(name, one):
            published, shortest = study["published"], study["shortest"]
            rows.append(
                [
                    label,
                    f"{study['n']} in {study['clusters']}",
                    f"{study['zero perturbation']['estimate']:.2f}",
                    *(f"{published[arm]['recovered']['estimate']:.2f}" for arm in ARMS),
                    f"{published['paper']['drift']['pre']:.2g} / {published['exact']['drift']['pre']:.1g}",
                    *(cell(shortest[arm]["epsilon50"]) for arm in ("free", "exact")),
                    cell(study["gap"]),
                    cell(study["gain"]),
                    study["verdict"],
                ]
            )
    head = ["setting", "rows in clusters", "δ = 0", *(f"recovered, {arm}" for arm in ARMS)]
    head += ["drift, paper / exact", "ε50 free", "ε50 exact", "gap", "gain", "verdict"]
    return [*grid(head, rows), ""]


def studies(name: str, one: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if not name.startswith("tpp"):
        return [(name, one)]
    found = [(f"{name}: {label}", own["study"]) for label, own in one["classes"].items()]
    return [(label, study) for label, study in found if study is not None]
