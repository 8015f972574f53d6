"""A stress test's certificate as one table: text for a terminal, HTML for a notebook."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from molehunt.report.escape import visible

HEADER = ("", "recovered", "length for half", "drift")
WIDTHS = (24, 20, 22, 10)


def stress_summary(certificate: Mapping[str, Any]) -> str:
    """Verdict, table and cost, in lines."""
    rows = [HEADER, *_rows(certificate)]
    name, *numbers = WIDTHS
    table = [
        f"{row[0]:<{name}}" + "".join(f"{text:>{width}}" for text, width in zip(row[1:], numbers, strict=True))
        for row in rows
    ]
    return "\n".join(
        [_headline(certificate), _counts(certificate), *(line.rstrip() for line in table), *_radii(certificate)]
    )


def stress_table(certificate: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """The same as HTML. Every text of a model, a file or a user is escaped."""
    head = Markup("").join(Markup("<th>{}</th>").format(text) for text in HEADER)
    body = Markup("").join(
        Markup("<tr><th>{}</th>{}</tr>").format(
            row[0].strip(), Markup("").join(Markup("<td>{}</td>").format(text) for text in row[1:])
        )
        for row in _rows(certificate)
    )
    after = Markup("").join(Markup("<p>{}</p>").format(text) for text in (*_radii(certificate), *notes))
    return Markup("<p><b>{}</b></p><p>{}</p><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>{}").format(
        escape(visible(_headline(certificate))), _counts(certificate), head, body, after
    )


def _rows(certificate: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for arm in certificate["arms"]:
        yield arm["name"], share_text(arm["recovered"]), length_text(arm["epsilon50"]), _drift(arm)
    for name, control in certificate["controls"].items():
        length = "" if control["epsilon50"] is None else length_text(control["epsilon50"])
        yield name, share_text(control["recovered"]), length, ""
    for suffix in certificate["inputs"]:
        yield suffix["name"], share_text(suffix["recovered"]), "", _drift(suffix)
        yield "  random target", share_text(suffix["random_target"]), "", ""


def _drift(arm: Mapping[str, Any]) -> str:
    return f"{arm['drift']['pre_activation']['median']:.1g}"


def _headline(certificate: Mapping[str, Any]) -> str:
    return f"{certificate['verdict']}  ({certificate['fix']})"


def _counts(certificate: Mapping[str, Any]) -> str:
    rows = certificate["prompts"]
    return (
        f"{rows['with_behaviour']} of {rows['given']} prompts show the behaviour, the fix flips {rows['flipped']}, "
        f"{rows['attacked']} are attacked; without a perturbation {share_text(certificate['zero_perturbation'])} show it"
    )


def _radii(certificate: Mapping[str, Any]) -> list[str]:
    lower, cost = certificate["lower"], certificate["cost"]
    return [
        f"a random target takes {times_text(certificate['specificity_gap'])} the length",
        f"lower radius, proved for the decision under noise: median {lower['median']:.2g} (no more than "
        f"{lower['largest_provable']:.2g} can be proved so)",
        f"cost of the fix: {share_text(cost['clean_changed'])} of clean answers changed, KL {cost['kl']:.4f} nats a token",
    ]


def share_text(found: Mapping[str, float]) -> str:
    """A proportion with its limits."""
    return f"{found['estimate']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def length_text(found: Mapping[str, float | None] | None) -> str:
    """A median length with its limits, which may be infinite."""
    if found is None:
        return "not half"
    high = "∞" if found["high"] is None else f"{found['high']:.2g}"
    return f"{found['estimate']:.2g} [{found['low']:.2g}, {high}]"


def times_text(found: Mapping[str, float | None] | None) -> str:
    """How many times as long."""
    return "(too few rows to say)" if found is None else f"{length_text(found)} times"
