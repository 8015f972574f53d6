"""Shares by block, drawn: what an edit at each block does, and its control."""

from collections.abc import Sequence

from markupsafe import Markup

from molehunt.report.schema import BlockShare, Measure

WIDTH, HEIGHT = 560, 214
LEFT, RIGHT, TOP, BOTTOM = 40, 550, 12, 164
APART = 5
"""Pixels by which control and effect stand beside the middle of their block."""


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
