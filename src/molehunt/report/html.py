"""The report as one self-contained page: no script, no request, every foreign text escaped and visible."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from molehunt.report.blocks_figure import by_block
from molehunt.report.markdown import number
from molehunt.report.schema import CausalRow, Context, Heat, HeatCell, Measure, Report
from molehunt.report.visible import visible

TEMPLATES = Path(__file__).parent / "templates"
ICONS = {
    "FLAGGED-CAUSAL": "●",
    "FLAGGED-CORRELATIONAL": "◐",
    "NO FINDING": "○",
    "NOT TESTABLE": "◇",
    "INVALID INPUT": "✕",
}
BAR = 130
"""Width of the dot-and-interval drawing, in pixels, for a share of 1."""
CELL_W, CELL_H = 30, 22


def to_html(report: Report) -> str:
    """The page, in the order: verdict, evidence, where, contexts, before and after, cost, limits, appendix."""
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
    }
    environment.filters.update(filters)
    css = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template("report.html.j2").render(
        r=report,
        css=css,
        slug=report.verdict.value.lower().replace(" ", "-"),
        icon=ICONS[report.verdict.value],
        heat=heat_map(report.heat) if report.heat is not None else None,
    )


def escaping(folder: Path) -> Environment:
    """Templates of a folder: all that is put in is escaped, and a name that was not given is an error."""
    loader = FileSystemLoader(folder)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _lines(text: str) -> str:
    return visible(text, keep_lines=True)


def dot(size: Measure | None, chance: Measure | None = None) -> Markup:
    """A share as a dot with its interval on a 0 to 1 line; a tick marks chance."""
    if size is None:
        return Markup("")

    def x(value: float) -> float:
        return round(6 + (BAR - 12) * min(1.0, max(0.0, value)), 1)

    parts = [Markup('<line class="axis" x1="6" x2="{}" y1="9" y2="9"/>').format(BAR - 6)]
    if chance is not None:
        parts.append(Markup('<line class="chance" x1="{0}" x2="{0}" y1="2" y2="16"/>').format(x(chance.value)))
    if size.low is not None and size.high is not None:
        parts.append(Markup('<line class="interval" x1="{}" x2="{}" y1="9" y2="9"/>').format(x(size.low), x(size.high)))
    parts.append(Markup('<circle class="dot" cx="{}" cy="9" r="4.5"/>').format(x(size.value)))
    label = f"{number(size)}" + (f", chance {chance.value:.2f}" if chance is not None else "")
    return Markup('<svg class="measure" role="img" aria-label="{}" width="{}" height="18">{}</svg>').format(
        label, BAR, Markup("").join(parts)
    )


def shaded(context: Context) -> Markup:
    """Tokens of a row, each as dark as the two models disagree there; the answer is set apart."""
    spans: list[Markup] = []
    left = 900
    for i, (token, shade) in enumerate(zip(context.tokens, context.shades, strict=True)):
        if left <= 0:
            spans.append(Markup(" … ({} tokens more)").format(len(context.tokens) - i))
            break
        left -= len(token)
        step = min(9, int(10 * min(1.0, max(0.0, shade))))
        if i == context.answer_at:
            spans.append(Markup('<span class="arrow" aria-label="answer">→</span>'))
        text = Markup("<br>").join(escape(visible(part)) for part in token.split("\n"))
        spans.append(Markup('<span class="s{}">{}</span>').format(step, text) if step else text)
    return Markup("").join(spans)


def marked(row: CausalRow, column: str) -> Markup:
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


def heat_map(heat: Heat) -> Markup:
    """Layer × module as an SVG; darker is more one-directional than a random change of that size."""
    left, top = 64, 8
    cells = {(c.layer, c.module): c for c in heat.cells}
    largest = max((c.z for c in heat.cells if c.z is not None), default=1.0) or 1.0
    parts: list[Markup] = []
    for row, module in enumerate(heat.modules):
        y = top + row * CELL_H
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(left - 8, y + 15, module))
        for column, layer in enumerate(heat.layers):
            found = cells.get((layer, module))
            if found is None:
                continue
            step = "none" if found.z is None else str(min(9, max(0, int(10 * found.z / largest))))
            parts.append(
                Markup('<rect class="h{}" x="{}" y="{}" width="{}" height="{}" rx="3"><title>{}</title></rect>').format(
                    step, left + column * CELL_W, y, CELL_W - 3, CELL_H - 3, _told(found)
                )
            )
    bottom = top + len(heat.modules) * CELL_H
    every = max(1, len(heat.layers) // 16)
    parts += [
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            left + i * CELL_W + (CELL_W - 3) / 2, bottom + 16, layer
        )
        for i, layer in enumerate(heat.layers)
        if i % every == 0
    ]
    width, height = left + len(heat.layers) * CELL_W + 8, bottom + 24
    return Markup('<svg class="heat" role="img" aria-label="{}" width="{}" height="{}">{}</svg>').format(
        f"change by layer and module, largest z {largest:.0f}", width, height, Markup("").join(parts)
    )


def _told(cell: HeatCell) -> str:
    z = cell.status if cell.z is None else f"z {cell.z:.1f}"
    size = "" if cell.relative_norm is None else f", ‖ΔW‖/‖W‖ {cell.relative_norm:.2g}"
    return f"layer {cell.layer} {cell.module}: {z}{size}"
