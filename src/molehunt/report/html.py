"""The report as one self-contained page: no script, no request, every foreign text escaped and visible."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from molehunt.report.escape import number, visible
from molehunt.report.figures import by_block, dot, heat_map
from molehunt.report.inventory_section import MEANING, cause_in_words, condition_in_words, summary_sentence
from molehunt.report.schema import AnswerComparison, Report, ShadedRow

TEMPLATES = Path(__file__).parent / "templates"
ICONS = {
    "FLAGGED-CAUSAL": "●",
    "FLAGGED-CORRELATIONAL": "◐",
    "NO FINDING": "○",
    "NOT TESTABLE": "◇",
    "INVALID INPUT": "✕",
}


def to_html(report: Report) -> str:
    """The page, in the order: verdict, what the fine-tune does, evidence, where, contexts, before and after, cost, limits, appendix."""
    environment = _report_templates()
    css = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template("report.html.j2").render(
        r=report,
        css=css,
        slug=report.verdict.value.lower().replace(" ", "-"),
        icon=ICONS[report.verdict.value],
        heat=heat_map(report.heat) if report.heat is not None else None,
        meaning=MEANING,
    )


def to_notebook(report: Report) -> str:
    """A fragment for a notebook's cell: verdict, reason, the evidence table, and a few answers; no style of its own."""
    template = _report_templates().get_template("notebook.html.j2")
    return template.render(r=report, icon=ICONS[report.verdict.value])


def _report_templates() -> Environment:
    environment = escaping(TEMPLATES)
    filters: dict[str, Any] = {
        "visible": visible,
        "lines": _lines,
        "number": number,
        "blocks": by_block,
        "dot": dot,
        "shaded": shaded,
        "marked": marked,
        "percent": "{:.0%}".format,
        "depends": condition_in_words,
        "sentences": cause_in_words,
        "counted": summary_sentence,
    }
    environment.filters.update(filters)
    return environment


def escaping(folder: Path) -> Environment:
    """Templates of a folder: all that is put in is escaped, and a name that was not given is an error."""
    loader = FileSystemLoader(folder)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _lines(text: str) -> str:
    return visible(text, keep_lines=True)


def shaded(row: ShadedRow) -> Markup:
    """Tokens of a row, each as dark as the two models disagree there; the answer is set apart."""
    spans: list[Markup] = []
    left = 900
    for i, (token, shade) in enumerate(zip(row.tokens, row.shades, strict=True)):
        if left <= 0:
            spans.append(Markup(" … ({} tokens more)").format(len(row.tokens) - i))
            break
        left -= len(token)
        step = min(9, int(10 * min(1.0, max(0.0, shade))))
        if i == row.answer_at:
            spans.append(Markup('<span class="arrow" aria-label="answer">→</span>'))
        text = Markup("<br>").join(escape(visible(part)) for part in token.split("\n"))
        spans.append(Markup('<span class="s{}">{}</span>').format(step, text) if step else text)
    return Markup("").join(spans)


def marked(row: AnswerComparison, column: str) -> Markup:
    """One answer of a before-and-after row; words that the base's answer does not have are marked."""
    text = _lines({"tuned": row.tuned, "intervened": row.intervened, "control": row.control}[column])
    known = set(row.base.split())
    out: list[Markup] = []
    for i, line in enumerate(text.split("\n")):
        if i:
            out.append(Markup("\n"))
        indent = len(line) - len(line.lstrip(" "))
        out.append(Markup(" " * indent))
        words = [
            escape(word) if word in known else Markup('<mark title="not in the base’s answer">{}</mark>').format(word)
            for word in line.split()
        ]
        out.append(Markup(" ").join(words))
    return Markup("").join(out)
