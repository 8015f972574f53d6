"""The section of the stress page on linear probes."""

from typing import Any

from experiments.page import grid
from experiments.stress.sections import ARMS, cell, share


def tpp(name: str, one: dict[str, Any]) -> list[str]:
    texts = one["texts"]
    lines = [
        f"## {name}",
        "",
        f"{one['site']}, FVU {one['fvu']:.3f}, L0 {one['l0']:.1f}; {texts['fit']} texts to fit probes and dictionary on, {texts['select']} to choose latents by, "
        f"{texts['test']} to judge by. {one['seconds']:.0f} s of CPU. Lengths are of one perturbation at every token, in units of the median ‖h‖ of mean activations; "
        "the readout is linear, so that the closed form is the answer and the search is checked by it.",
        "",
    ]
    rows: list[list[str]] = []
    for label, own in one["classes"].items():
        study, at = own["study"], own["sizes"][str(one["study of"])]
        if study is None:
            rows.append([label, str(at["flipped"]), f"{at['score']:.2f}", *["–"] * 9])
            continue
        closed, published, control = study["closed"], study["published"], study["controls"]
        rows.append(
            [
                label,
                f"{at['flipped']} of {at['texts']}",
                f"{at['score']:.2f}",
                " / ".join(f"{published[arm]['recovered']['estimate']:.2f}" for arm in ARMS),
                " / ".join(f"{published[arm]['drift']['largest']:.1g}" for arm in ARMS),
                *(cell(closed[arm]["epsilon50"]) for arm in ("free", "exact")),
                " / ".join(cell(closed[arm]["searched over it"]) for arm in ("free", "exact")),
                cell(control["random target"]["epsilon50"]),
                cell(control["undefended"]["epsilon50"]),
                " / ".join(
                    share(control[which]["recovered"]) for which in ("random perturbation", "universal perturbation")
                ),
                f"{cell(study['gap'])}, {cell(study['gain'])}",
            ]
        )
    head = [
        "class",
        "flipped texts",
        "TPP",
        "recovered as published: free / paper / exact",
        "largest change of S: same",
    ]
    head += ["ε50 free, closed form", "exact", "search over closed form: free / exact", "random target ε50"]
    head += ["undefended ε50", "random / universal perturbation", "gap, gain"]
    lines += [
        *grid(head, rows),
        "",
        "By the number of ablated latents, flipped texts and their exact ε50 in closed form:",
        "",
    ]
    counts = next(iter(one["classes"].values()))["sizes"]
    rows = [
        [label, *(f"{size['flipped']}: {cell(size['closed'].get('exact'))}" for size in own["sizes"].values())]
        for label, own in one["classes"].items()
    ]
    return [*lines, *grid(["class", *counts], rows), ""]
