"""A layer sweep as one self-contained page: no script, no request, every foreign text escaped and visible."""

from collections.abc import Callable, Sequence

from markupsafe import Markup

from molehunt.measure.interval import Interval
from molehunt.report.blocks_figure import by_block
from molehunt.report.html import TEMPLATES, escaping
from molehunt.report.measured import measure
from molehunt.report.roles_figure import by_role
from molehunt.report.schema import BlockShare
from molehunt.report.visible import visible
from molehunt.steer.sweep import Sweep, Swept

MAPS: tuple[tuple[str, Callable[[Swept], Interval]], ...] = (
    ("removed by the patch", lambda block: block.removed),
    ("removed by noise of the same norm", lambda block: block.by_noise),
    ("induced in contrast prompts", lambda block: block.induced),
)
"""What is drawn by position, in percent."""


def render_sweep(sweep: Sweep, *, title: str, shows: Sequence[str], command: str) -> str:
    """The page.

    Args:
        sweep: what was measured.
        title: such as the model's name.
        shows: the phrases that a shown behaviour has one of.
        command: repeats it.
    """
    environment = escaping(TEMPLATES)
    environment.filters["visible"] = visible
    environment.filters["share"] = _share
    blocks = [
        BlockShare(
            block=str(one.site),
            intervention="patched by the contrast prompt's activations",
            removed=measure(one.removed),
            control=measure(one.by_noise),
        )
        for one in sweep.blocks
    ]
    return environment.get_template("sweep.html.j2").render(
        s=sweep,
        title=title,
        shows=shows,
        command=command,
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        drawing=by_block(blocks, "patched", "noise of the same norm"),
        maps=[(what, by_role(sweep.roles, what, share)) for what, share in MAPS] if sweep.roles else [],
    )


def _share(found: Interval) -> str:
    return f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"
