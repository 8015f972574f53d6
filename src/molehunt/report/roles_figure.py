"""A sweep by position and block, drawn: what patching one role of positions alone does, and its control."""

from collections.abc import Callable, Sequence

from markupsafe import Markup

from molehunt.measure.interval import Interval
from molehunt.steer.sweep import Swept, SweptRole

CELL_W, CELL_H = 30, 24
LETTER = 6.4
"""Pixels of a letter of a label, at most on average."""
DARKEST = 0.62
"""Opacity of a share of 1: the numbers stay readable on it, in light and dark."""


def by_role(roles: Sequence[SweptRole], what: str, share: Callable[[Swept], Interval]) -> Markup:
    """Role × block as an SVG; the darker a cell, the larger its share, which stands in it in percent.

    Args:
        roles: of a sweep, at least one.
        what: is drawn, such as `removed by noise`.
        share: which of a block's shares.
    """
    left = round(LETTER * max(len(role.role) for role in roles)) + 10
    sites = [block.site for block in roles[0].blocks]
    parts: list[Markup] = []
    for row, role in enumerate(roles):
        y = CELL_H * row
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(left - 8, y + 15, role.role))
        for column, block in enumerate(role.blocks):
            found = share(block)
            parts.append(_cell(left + CELL_W * column, y, found.estimate, f"{role.role} at {block.site}: {found}"))
    bottom = CELL_H * len(roles)
    parts += [
        Markup('<text x="{}" y="{}" text-anchor="middle">L{}</text>').format(
            left + CELL_W * i + (CELL_W - 3) / 2, bottom + 13, site.layer
        )
        for i, site in enumerate(sites)
    ]
    label = f"{what}, by position and block: {_largest(roles, share)}"
    return Markup('<svg class="heat" role="img" aria-label="{}" width="{}" height="{}">{}</svg>').format(
        label, left + CELL_W * len(sites), bottom + 18, Markup("").join(parts)
    )


def _cell(x: int, y: int, share: float, told: str) -> Markup:
    shade = f"{0.04 + (DARKEST - 0.04) * share:.2f}"
    box = Markup('<rect class="shade" x="{}" y="{}" width="{}" height="{}" rx="3" fill-opacity="{}"/>').format(
        x, y, CELL_W - 3, CELL_H - 3, shade
    )
    number = Markup('<text class="in" x="{}" y="{}" text-anchor="middle">{:.0f}</text>').format(
        x + (CELL_W - 3) / 2, y + 15, 100 * share
    )
    return Markup("<g><title>{}</title>{}{}</g>").format(told, box, number)


def _largest(roles: Sequence[SweptRole], share: Callable[[Swept], Interval]) -> str:
    estimate, role, site = max(
        ((share(block).estimate, role.role, str(block.site)) for role in roles for block in role.blocks),
        key=lambda found: found[0],
    )
    return f"at most {estimate:.2f}, at the {role} at {site}"
