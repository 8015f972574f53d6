"""The section of the stress page on a choice between tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.page import grid
from experiments.stress.sections import arms, attribution, cell, controls, share


def choices(name: str, one: dict[str, Any]) -> list[str]:
    lines = [f"## {name}", ""]
    lines += [
        f"{one['site']}, {one['latents']} latents, active ones set to −{one['value']:g}. Of {one['rows']} rows {one['shown']} show the behaviour, "
        f"{one['flipped']} of them not under the clamp, {one['broken']} of those broken: {one['valid']} are valid, in {one['clusters']} clusters of those attacked; "
        f"{one['n']} are attacked. Median ‖h‖: {one['unit']:.3g}. The clamp costs ordinary answers {one['cost']['loss']:.3f} nats a token "
        f"(KL {one['cost']['kl']:.3f}). δ = 0: {share(one['zero perturbation'])}. {one['seconds']:.0f} s of CPU, {one['teaching']:.0f} of them to teach the model.",
        "",
    ]
    if "retain" in one:
        lines += [
            f"Answers that are right: {one['right']:.3f} of the topic, {one['right elsewhere']:.3f} elsewhere; questions right in all 24 orders: "
            f"{share(one['whole'])}. Under the clamp {one['retain']:.3f} of the right ones elsewhere are right.",
            "",
        ]
    lines += [*arms(one), *controls(one), *attribution(one["attribution"]), *sizes(one["sizes"])]
    return lines + (depths(one["depths"]) if "depths" in one else tried(one["tried"]))


def sizes(found: Mapping[str, dict[str, Any]]) -> list[str]:
    rows = [
        [
            f"{n} ({one['latents']})",
            *(str(one[key]) for key in ("flipped", "broken", "valid")),
            f"{one['cost']['loss']:.3f}",
            *([f"{one['retain']:.3f}"] if "retain" in one else []),
            share(one["least"]["recovered"]),
            cell(one["least"]["epsilon50"]),
        ]
        for n, one in found.items()
    ]
    elsewhere = ["right elsewhere"] if any("retain" in one for one in found.values()) else []
    head = [
        "latents asked for (found)",
        "flipped",
        "broken",
        "valid",
        "cost, nats",
        *elsewhere,
        "exact: recovered",
        "ε50",
    ]
    return ["By the number of clamped latents:", "", *grid(head, rows), ""]


def depths(found: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        [
            one["site"],
            f"{one['fvu']:.3f}",
            f"{one['l0']:.1f}",
            str(one["attributed"]),
            *(f"{flips['valid']} of {flips['flipped']}" for flips in one["flips"].values()),
        ]
        for one in found
    ]
    head = ["block", "FVU", "L0", "latents attributed to it", *(f"valid of flipped, {n}" for n in found[0]["flips"])]
    return ["The block and the number were chosen on other rows:", "", *grid(head, rows), ""]


def tried(found: Sequence[dict[str, Any]]) -> list[str]:
    sites = list(dict.fromkeys(one["site"] for one in found))
    rows: list[list[str]] = []
    for site in sites:
        own = [one for one in found if one["site"] == site]
        best = max(own, key=lambda one: (one["retain"] >= 0.95, one["valid"], one["retain"]))
        rows.append(
            [
                site,
                f"{best['fvu']:.3f}",
                f"{best['l0']:.1f}",
                str(best["latents"]),
                f"{best['size']} to −{best['value']:g}",
                f"{best['forget']:.2f}",
                str(best["valid"]),
                f"{best['retain']:.3f}",
            ]
        )
    head = [
        "block",
        "FVU",
        "L0",
        "latents found",
        "best clamp",
        "of the topic still right",
        "valid rows",
        "right elsewhere",
    ]
    return ["Block, number and value were chosen on other questions:", "", *grid(head, rows), ""]
