"""A stress test as one self-contained page: no script, no request, every foreign text escaped and visible."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from molehunt.report.curves_figure import by_length
from molehunt.report.html import TEMPLATES, escaping
from molehunt.report.visible import visible
from molehunt.stress.study import AT, Study

MEANINGS = {
    "RECOVERABLE": "with the fix on, a push that leaves what it watches alone brings the behaviour back, at lengths at which it "
    "does not yet bring just anything. Compare the length with what it takes on clean prompts of the unfixed model.",
    "OVERRIDDEN": "pushes bring the behaviour back, but bring a random answer with less: this shows that the model can be "
    "steered, and nothing about what it still holds.",
    "UNDECIDED": "these rows do not tell. Either the behaviour and a random answer come back at lengths that cannot be told "
    "apart, or the attack did not even bring the behaviour out of half of the unfixed model’s clean prompts: it was too weak to test a fix.",
    "NOT BROUGHT BACK": "these attacks did not do better than random pushes of the same length. That is no proof that others "
    "would not.",
}
NAMES = {
    "free": "free: anything may move",
    "paper": "published: gradients projected, then Adam, the whole ball",
    "exact": "exact: what the fix watches does not move",
}
SAYS = {
    "random target": "the same attack, asked for another prompt’s answer",
    "undefended": "what it takes on clean prompts without any fix",
    "random push": "as long as the exact attack’s, in random directions",
    "universal push": "the mean of the other rows’ pushes",
}

SUFFIXES = {
    "soft suffix": "soft suffix: embeddings that no token has",
    "discrete suffix": "discrete suffix (GCG): tokens that can be typed",
}


def render_stress(study: Study, told: Mapping[str, Any], *, title: str, shows: Sequence[str]) -> str:
    """The page.

    Args:
        study: what was measured.
        told: its certificate.
        title: such as the model's name.
        shows: the phrases that a shown behaviour has one of.
    """
    environment = escaping(TEMPLATES)
    environment.filters.update({"visible": visible, "share": share_of, "length_of": length_of, "times": times_of})
    curves = [(NAMES[arm.name], arm.curve()) for arm in study.arms]
    curves += [(name, one.curve()) for name, one in study.controls.items() if one.lengths is not None]
    return environment.get_template("stress.html.j2").render(
        c=told,
        meaning=MEANINGS[study.verdict],
        names=NAMES,
        says=SAYS,
        suffixes=SUFFIXES,
        title=title,
        shows=shows,
        told=study.told,
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        drawing=by_length(AT, curves, "Share of prompts brought back, by the length of the push"),
    )


def share_of(found: Mapping[str, float]) -> str:
    """A proportion with its limits."""
    return f"{found['estimate']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def length_of(found: Mapping[str, float | None] | None) -> str:
    """A median length with its limits, which may be infinite."""
    if found is None:
        return "not half"
    high = "∞" if found["high"] is None else f"{found['high']:.2g}"
    return f"{found['estimate']:.2g} [{found['low']:.2g}, {high}]"


def times_of(found: Mapping[str, float | None] | None) -> str:
    """How many times as long."""
    return "(too few rows to say)" if found is None else f"{length_of(found)} times"
