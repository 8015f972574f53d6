"""Drawings of a report as SVG: shares by block, shares by length, one share with its interval, and the layer map."""

from collections.abc import Sequence

from markupsafe import Markup

from molehunt.report.escape import number
from molehunt.report.schema import BlockShare, Heat, HeatCell, Measure

WIDTH, HEIGHT = 560, 214
LEFT, RIGHT, TOP, BOTTOM = 40, 550, 12, 164
APART = 5
"""Pixels by which control and effect stand beside the middle of their block."""
LINE = 18
"""Pixels that a line of the legend takes."""
CURVES = ("one", "two", "three", "four", "five")
"""Styles of lines that differ without colour; see report.css."""
BAR = 130
"""Width of the dot-and-interval drawing, in pixels, for a share of 1."""
CELL_W, CELL_H = 30, 22


def by_block(blocks: Sequence[BlockShare], effect: str = "removed", control: str = "random edit") -> Markup:
    """Shares by block with their intervals: what an edit there removes, and its control."""

    def x(i: int) -> float:
        return LEFT + (RIGHT - LEFT) * (i + 0.5) / len(blocks)

    def y(share: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * share, 1)

    def mark(kind: str, at: float, share: Measure) -> Markup:
        ends = (share.low if share.low is not None else share.value, share.high or share.value)
        drawn = Markup('<line class="{} span" x1="{x}" x2="{x}" y1="{}" y2="{}"/>').format(
            kind, y(ends[0]), y(ends[1]), x=round(at, 1)
        )
        shape = (
            Markup('<circle class="{}" cx="{}" cy="{}" r="4.5"/>')
            if kind == "effect"
            else Markup('<rect class="{}" x="{}" y="{}" width="8" height="8"/>')
        )
        corner = (at, y(share.value)) if kind == "effect" else (at - 4, y(share.value) - 4)
        return drawn + shape.format(kind, round(corner[0], 1), round(corner[1], 1))

    parts = [
        Markup('<line class="rule" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(LEFT, RIGHT, y=y(share))
        + Markup('<text x="{}" y="{}" text-anchor="end">{:g}</text>').format(LEFT - 6, y(share) + 4, share)
        for share in (0.0, 0.5, 1.0)
    ]
    every = max(1, -(-len(blocks) // 14))  # no more labels than fit
    for i, one in enumerate(blocks):
        parts += [mark("control", x(i) + APART, one.control), mark("effect", x(i) - APART, one.removed)]
        if i % every == 0:
            label = one.block.removesuffix(".resid")
            parts.append(
                Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x(i), BOTTOM + 16, label)
            )
    for i, (kind, label) in enumerate((("effect", effect), ("control", control))):
        at = LEFT + 150 * i
        shape = (
            Markup('<circle class="effect" cx="{}" cy="{}" r="4.5"/>').format(at + 5, HEIGHT - 14)
            if kind == "effect"
            else Markup('<rect class="control" x="{}" y="{}" width="8" height="8"/>').format(at + 1, HEIGHT - 18)
        )
        parts.append(shape + Markup('<text x="{}" y="{}">{}</text>').format(at + 16, HEIGHT - 10, label))
    return Markup('<svg class="blocks" role="img" aria-label="{}" viewBox="0 0 {} {}">{}</svg>').format(
        f"Share {effect} and under a {control}, block by block", WIDTH, HEIGHT, Markup("").join(parts)
    )


def by_length(at: Sequence[float], curves: Sequence[tuple[str, Sequence[float]]], what: str) -> Markup:
    """One line for each curve.

    Args:
        at: rising lengths, evenly spaced on a logarithmic axis.
        curves: name, and shares at those lengths; no more than `CURVES`.
        what: what is drawn, for readers who do not see.
    """
    height = BOTTOM + 40 + LINE * len(curves)

    def x(i: int) -> float:
        return round(LEFT + (RIGHT - LEFT) * i / (len(at) - 1), 1)

    def y(share: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * share, 1)

    parts = [
        Markup('<line class="rule" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(LEFT, RIGHT, y=y(share))
        + Markup('<text x="{}" y="{}" text-anchor="end">{:g}</text>').format(LEFT - 6, y(share) + 4, share)
        for share in (0.0, 0.5, 1.0)
    ]
    for i, length in enumerate(at):
        anchor = "end" if i == len(at) - 1 else "middle"
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="{}">{:g}</text>').format(x(i), BOTTOM + 16, anchor, length)
        )
    for row, (kind, (name, shares)) in enumerate(zip(CURVES, curves, strict=False)):
        points = " ".join(f"{x(i)},{y(share)}" for i, share in enumerate(shares))
        parts.append(Markup('<polyline class="curve {}" points="{}"/>').format(kind, points))
        at_y = BOTTOM + 36 + LINE * row
        parts.append(
            Markup('<line class="curve {}" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text x="{}" y="{}">{}</text>').format(
                kind, LEFT, LEFT + 34, LEFT + 42, at_y + 4, name, y=at_y
            )
        )
    return Markup('<svg class="blocks" role="img" aria-label="{}" viewBox="0 0 {} {}">{}</svg>').format(
        what, WIDTH, height, Markup("").join(parts)
    )


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
                    step, left + column * CELL_W, y, CELL_W - 3, CELL_H - 3, _described(found)
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


def _described(cell: HeatCell) -> str:
    z = cell.status if cell.z is None else f"z {cell.z:.1f}"
    size = "" if cell.relative_norm is None else f", ‖ΔW‖/‖W‖ {cell.relative_norm:.2g}"
    return f"layer {cell.layer} {cell.module}: {z}{size}"
