"""Parts of the stress page that several settings share: arms, controls, attribution."""

from typing import Any

from experiments.page import grid
from experiments.stress.payload import AT

ARMS = {"free": "free", "paper": "paper: gradient projected, then Adam", "exact": "exact: δ − QQᵀδ"}


CONTROLS = {
    "random target": "random target, the same perturbation asked for something else",
    "undefended": "undefended: a row without the clamp, flipped",
    "random perturbation": "random δ of the same length",
    "universal perturbation": "universal: the mean of the other clusters' δ, at this length",
}


def arms(study: dict[str, Any]) -> list[str]:
    head = ["as published", "recovered", "margin", "drift of S", "largest", "codes", "silent", "reactivated"]
    rows: list[list[str]] = []
    for arm, name in ARMS.items():
        one = study["published"][arm]
        drift = one["drift"]
        rows.append(
            [
                name,
                share(one["recovered"]),
                f"{one['margin']:.2g}",
                f"{drift['pre']:.2g}",
                f"{drift['pre, largest']:.2g}",
                number(drift["codes"]),
                f"{drift['silent']:.2f}",
                number(drift["reactivated"]),
            ]
        )
    lines = [*grid(head, rows), ""]
    head = ["shortest", "recovered", "ε50", "drift of S", "largest", *(f"≤ {at:g}" for at in AT)]
    rows = []
    for arm, name in ARMS.items():
        one = study["shortest"][arm]
        cells = [name, share(one["recovered"]), cell(one["epsilon50"]), f"{one['drift']['pre']:.2g}"]
        rows.append(
            [*cells, f"{one['drift']['pre, largest']:.2g}", *(f"{share_within:.2f}" for share_within in one["curve"])]
        )
    apart = study["free against exact"]
    return [
        *lines,
        *grid(head, rows),
        "",
        f"The exact perturbation is {cell(study['held'])} times as long as the free one. Within {study['at']:.3g}, where half of the free ones are recovered, "
        f"{apart['only_first']} rows are recovered in the free arm alone and {apart['only_second']} in the exact one alone (McNemar p {apart['p_value']:.2g}, rows counted as independent).",
        "",
    ]


def controls(study: dict[str, Any]) -> list[str]:
    rows = [
        [label, share(one["recovered"]), cell(one["epsilon50"])]
        for name, label in CONTROLS.items()
        if (one := study["controls"].get(name)) is not None
    ]
    return [
        *grid(["control", "recovered", "ε50"], rows),
        "",
        f"Gap {cell(study['gap'])}, gain {cell(study['gain'])}: {study['verdict']}.",
        "",
    ]


def attribution(one: dict[str, Any] | None) -> list[str]:
    if one is None:
        return ["Too few rows are recovered for an attribution.", ""]
    rows = [
        [
            name,
            *(f"{share(part[way]['recovered'])}" for way in ("alone", "alone, at norm", "without", "without, at norm")),
            f"{part['alone']['norm']:.2f}",
        ]
        for name, part in one["parts"].items()
    ]
    return [
        f"Which part of the {one['rows']} exact perturbations as published does it:",
        "",
        *grid(
            ["part", "alone", "alone, as long as δ", "without it", "without it, as long as δ", "length, in ‖δ‖"], rows
        ),
        "",
        f"One vector has {one['first']:.2f} of their energy ({one['first by chance']:.2f} by chance); effective rank {one['rank']:.1f}.",
        "",
    ]


def share(found: dict[str, Any] | None) -> str:
    return "–" if found is None else f"{found['estimate']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def cell(found: dict[str, Any] | None) -> str:
    return "–" if found is None else f"{found['estimate']:.3g} [{found['low']:.3g}, {found['high']:.3g}]"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
