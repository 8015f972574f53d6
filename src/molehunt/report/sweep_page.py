"""A layer sweep as one self-contained page: no script, no request, every foreign text escaped and visible."""

from collections.abc import Callable, Sequence

from markupsafe import Markup

from molehunt.measure.interval import Interval
from molehunt.report.escape import visible
from molehunt.report.figures import by_block
from molehunt.report.html import TEMPLATES, escaping
from molehunt.report.schema import BlockShare, Measure
from molehunt.steer.sweep import Sweep, Swept, SweptRole

MAPS: tuple[tuple[str, Callable[[Swept], Interval]], ...] = (
    ("removed by the patch", lambda block: block.removed),
    ("removed by noise of the same norm", lambda block: block.by_noise),
    ("induced in contrast prompts", lambda block: block.induced),
)
"""What is drawn by position, in percent."""
CELL_W, CELL_H = 30, 24
LETTER = 6.4
"""Greatest average width of a letter of a label, in pixels."""
DARKEST = 0.62
"""Opacity of a share of 1: the numbers stay readable on it, in light and dark."""


def render_sweep(sweep: Sweep, *, title: str, phrases: Sequence[str], command: str) -> str:
    """The page of one sweep.

    Args:
        sweep: what was measured.
        title: the heading, such as the model's name.
        phrases: phrases of which an answer with the behaviour contains one.
        command: the command that repeats the sweep; empty where there is none.
    """
    environment = escaping(TEMPLATES)
    environment.filters["visible"] = visible
    environment.filters["share"] = _share
    blocks = [
        BlockShare(
            block=str(one.site),
            intervention="patched by the contrast prompt's activations",
            removed=Measure.from_interval(one.removed),
            control=Measure.from_interval(one.by_noise),
        )
        for one in sweep.blocks
    ]
    return environment.get_template("sweep.html.j2").render(
        s=sweep,
        title=title,
        phrases=phrases,
        command=command,
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        drawing=by_block(blocks, "patched", "noise of the same norm"),
        maps=[(what, by_role(sweep.roles, what, share)) for what, share in MAPS] if sweep.roles else [],
    )


def _share(found: Interval) -> str:
    return f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"


def by_role(roles: Sequence[SweptRole], what: str, share: Callable[[Swept], Interval]) -> Markup:
    """Role × block as an SVG; the darker a cell, the larger its share, which is printed in it in percent.

    Args:
        roles: the roles of a sweep, at least one.
        what: name of what is drawn, such as `removed by noise`.
        share: picks one of a block's shares.
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


def _cell(x: int, y: int, share: float, label: str) -> Markup:
    shade = f"{0.04 + (DARKEST - 0.04) * share:.2f}"
    box = Markup('<rect class="shade" x="{}" y="{}" width="{}" height="{}" rx="3" fill-opacity="{}"/>').format(
        x, y, CELL_W - 3, CELL_H - 3, shade
    )
    number = Markup('<text class="in" x="{}" y="{}" text-anchor="middle">{:.0f}</text>').format(
        x + (CELL_W - 3) / 2, y + 15, 100 * share
    )
    return Markup("<g><title>{}</title>{}{}</g>").format(label, box, number)


def _largest(roles: Sequence[SweptRole], share: Callable[[Swept], Interval]) -> str:
    estimate, role, site = max(
        ((share(block).estimate, role.role, str(block.site)) for role in roles for block in role.blocks),
        key=lambda found: found[0],
    )
    return f"at most {estimate:.2f}, at the {role} at {site}"
