"""Shares over a length on a logarithmic axis: what attacks of rising size bring back."""

from collections.abc import Sequence

from markupsafe import Markup

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 560, 40, 550, 12, 164
LINE = 18
"""Pixels a line of the legend takes."""
KINDS = ("one", "two", "three", "four", "five")
"""Looks of lines, told apart without colour; see report.css."""


def by_length(at: Sequence[float], curves: Sequence[tuple[str, Sequence[float]]], what: str) -> Markup:
    """One line for each curve.

    Args:
        at: lengths, rising, evenly spaced on a logarithmic axis.
        curves: name, and shares at those lengths; no more than `KINDS`.
        what: is drawn, for readers who do not see.
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
    for row, (kind, (name, shares)) in enumerate(zip(KINDS, curves, strict=False)):
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
