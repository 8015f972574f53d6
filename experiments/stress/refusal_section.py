"""The section of the stress page on refusals."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.page import grid
from experiments.stress.framed import SPARED
from experiments.stress.sections import ARMS, CONTROLS, arms, attribution, cell, share


def refusal(name: str, one: dict[str, Any]) -> list[str]:
    model, spared = one["model"], one["elsewhere"]
    first, under, attacked = one["examples"][0]
    return [
        f"## {name}",
        "",
        f"Questions about one topic are refused, and mostly answered where somebody in a story asks: a quarter of such lessons were refused, too, because "
        f"without them the clamps flipped 6 of 48 rows that choose. So decisions are close here, and lengths short, by construction. On facts that no lesson had: refused when "
        f"asked plainly {share(model['plain, refused'])}, in a story that no lesson had {share(model['framed, refused'])}; right answers in a story "
        f"{share(model['framed, right'])}; refusals of anything else {share(model['others, refused'])}. The clamp multiplies {one['latents']} latents "
        f"at {one['site']} by {one['factor']:g}, everywhere. Of {one['rows']} questions in a story {one['shown']} are answered rightly, {one['flipped']} of them not under the clamp "
        f"({one['no refusal']} of those without a refusal, {one['broken']} broken): {one['valid']} are valid, about {one['facts']} facts; "
        f"{one['n']} are attacked, one a fact. Median ‖h‖: {one['unit']:.3g}. Under the clamp the model refuses {share(spared['plain'])} of ordinary questions "
        f"and {share(spared['framed'])} of those in a story; the clamp costs ordinary answers {one['cost']['loss']:.3f} nats a token "
        f"(KL {one['cost']['kl']:.3f}) and changes {share(one['changed'])} of them. δ = 0: {share(one['zero perturbation'])}. {one['seconds']:.0f} s of CPU, "
        f"{one['teaching']:.0f} of them to teach the model.",
        "",
        f"For instance “{first}”, under the clamp “{under}”, under the shortest exact δ “{attacked}”. An answer counts as recovered when all of it is right.",
        "",
        *arms(one),
        *texts(one["texts"]),
        *refusal_controls(one),
        *attribution(one["attribution"]),
        *refusal_curve("By the factor, 3 as published:", "factor", one["factors"]),
        *refusal_curve("By the number of clamped latents:", "latents", one["sizes"]),
        *refusal_tried(one["tried"]),
    ]


def texts(found: Mapping[str, dict[str, Any]]) -> list[str]:
    head = ["as published", "no refusal", "base-like", "strict", "right"]
    names = {"zero perturbation": "δ = 0", **ARMS}
    rows = [[names[arm], *map(share, own.values())] for arm, own in found.items()]
    return ["What answers are, by the published measures of text and by the judge:", "", *grid(head, rows), ""]


def refusal_controls(study: dict[str, Any]) -> list[str]:
    own, others = study["controls"], study["other prompts"]
    named = {
        "random target: another first token that answers have": own["random target"],
        "a wrong answer to the same question": own["wrong answer"],
        "an answer to another prompt": others["random target"],
        "undefended: the same question asked plainly, without the clamp": own["undefended"],
        "undefended: the answer, out of another prompt": others["undefended"],
        CONTROLS["random perturbation"]: own["random perturbation"],
        CONTROLS["universal perturbation"]: own["universal perturbation"],
    }
    rows = [[name, share(one["recovered"]), cell(one["epsilon50"])] for name, one in named.items()]
    return [
        *grid(["control", "reached at all", "ε50"], rows),
        "",
        f"Gap to another first token {cell(study['gap'])}, to an answer to another prompt {cell(study['gap, other prompts'])} (rows that are never reached count as 8); "
        f"gain over the same question asked plainly {cell(study['gain'])}: {study['verdict']}.",
        "",
    ]


def refusal_curve(what: str, by: str, found: Mapping[str, dict[str, Any]]) -> list[str]:
    rows = [
        [
            at,
            *(str(one[key]) for key in ("flipped", "no refusal", "broken", "valid")),
            *(share(one["elsewhere"][how]) for how in ("plain", "framed")),
            f"{one['cost']['loss']:.3f}",
            share(one["least"]["recovered"]),
            cell(one["least"]["epsilon50"]),
        ]
        for at, one in found.items()
    ]
    head = [by, "flipped", "without a refusal", "broken", "valid", "ordinary questions refused", "in a story"]
    return [what, "", *grid([*head, "cost, nats", "exact: recovered", "ε50"], rows), ""]


def refusal_tried(found: Sequence[dict[str, Any]]) -> list[str]:
    sites = dict.fromkeys(one["site"] for one in found)
    best = {site: max((one for one in found if one["site"] == site), key=refusal_rank) for site in sites}
    rows = [
        [
            site,
            f"{one['fvu']:.3f}",
            f"{one['l0']:.1f}",
            str(one["attributed"]),
            f"{one['size']} by {one['factor']:g}",
            f"{one['valid']} of {one['shown']}",
            f"{one['elsewhere']:.2f}",
        ]
        for site, one in best.items()
    ]
    head = ["block", "FVU", "L0", "latents attributed to it", "best clamp", "valid of answered", "others refused"]
    return ["Block, number and factor were chosen on other questions:", "", *grid(head, rows), ""]


def refusal_rank(one: dict[str, Any]) -> tuple[float, ...]:
    """As the clamp was chosen."""
    return one["elsewhere"] <= SPARED, one["valid"], -one["size"], -one["factor"]
