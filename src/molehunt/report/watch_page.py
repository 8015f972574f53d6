"""A watch as one self-contained page: no script, no request, every foreign text escaped and visible."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from molehunt.report import watch_text
from molehunt.report.escape import visible
from molehunt.report.html import ICONS, TEMPLATES, escaping, shaded
from molehunt.report.schema import ShadedRow
from molehunt.report.watch_build import ALERTS_AMONG
from molehunt.report.watch_schema import Flagged, Histogram, InputGroup, WatchReport

WIDTH, HEIGHT = 460, 214
LEFT, RIGHT, TOP, BOTTOM = 8, 452, 18, 176
CUT = 300
"""Characters of one input that the page shows."""
CANNOT_SEE = {
    "conformal": (
        "A behaviour that the clean rows contain in answers which the base would give, too: it is part of what is normal.",
        "Traffic unlike the clean rows, or answers longer than theirs: these are judged, and their rate is not promised.",
        "A behaviour that no row of the log triggered.",
        "What another change than the fine-tune does: watched are the directions of the weight difference alone.",
    ),
    "published": (
        "A trigger that the clean rows, or an earlier row of the log, contain: the range takes in every row.",
        "Directions whose cosines stay far below the slack.",
        "A false-alarm rate: the range is left by chance, too, and how often is only measured.",
        "A behaviour that no row of the log triggered.",
    ),
}


def render_watch(report: WatchReport) -> str:
    """The page, in the order: verdict, scores, flagged rows, directions, drift, limits."""
    environment = escaping(TEMPLATES)
    filters: dict[str, Any] = {
        "visible": visible,
        "lines": partial(visible, keep_lines=True),
        "cut": partial(visible, keep_lines=True, limit=CUT),
        "shaded": _shaded,
        "interval": watch_text.interval,
        "answers": watch_text.answers_of,
        "where_shared": watch_text.where_shared,
        "shares": partial(_shares_text, no_text=report.no_text),
    }
    environment.filters.update(filters)
    css = "".join((TEMPLATES / file).read_text(encoding="utf-8") for file in ("report.css", "watch.css"))
    return environment.get_template("watch.html.j2").render(
        r=report,
        css=Markup(css),
        slug="flagged-correlational" if report.flagged else "no-finding",
        icon=ICONS["FLAGGED-CORRELATIONAL" if report.flagged else "NO FINDING"],
        says=watch_text.says(report),
        rate=watch_text.rate(report),
        answers_from=watch_text.answers_from(report),
        smallest_p=watch_text.smallest_p(report),
        drift=watch_text.drift(report),
        suspects=watch_text.suspects(report.suspects),
        end_words=watch_text.end_words(report),
        words_title=watch_text.WORDS_TITLE,
        candidates=watch_text.CANDIDATES,
        drawing=score_histogram(report.scores, report.threshold),
        bins=_bins(report.scores),
        among=ALERTS_AMONG,
        cannot_see=CANNOT_SEE[report.mode],
    )


def score_histogram(scores: Histogram, threshold: float) -> Markup:
    """Rows of the log as bars, calibration as a line over them, the threshold as a rule.

    A height is the square root of a share: of rare rows, too, something is seen.
    """
    log = [unflagged + flagged for unflagged, flagged in zip(scores.unflagged, scores.flagged, strict=True)]
    highest = max(*_shares(log), *_shares(scores.calibration), 1e-9)
    step = (RIGHT - LEFT) / len(log)

    def y(share: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * math.sqrt(share / highest), 1)

    def x(edge: int) -> float:
        return round(LEFT + edge * step, 1)

    parts: list[Markup] = []
    total = sum(log) or 1
    for i, (count, unflagged) in enumerate(zip(log, scores.unflagged, strict=True)):
        for kind, upper, lower in (("unflagged", unflagged, 0), ("beyond", count, unflagged)):
            if upper > lower:
                parts.append(
                    Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(
                        kind, x(i), y(upper / total), round(step - 1, 1), round(y(lower / total) - y(upper / total), 1)
                    )
                )
    line = " ".join(f"{x(i)},{y(share)} {x(i + 1)},{y(share)}" for i, share in enumerate(_shares(scores.calibration)))
    parts.append(Markup('<polyline class="steps" points="{}"/>').format(line))
    parts.append(Markup('<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, RIGHT, BOTTOM, BOTTOM))
    at = x(scores.edges.index(threshold) + 1)
    parts.append(Markup('<line class="limit" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(at, TOP - 8, BOTTOM))
    ticks = [(x(1), f"{scores.edges[0]:.3g}"), (at, f"{threshold:.3g}"), (x(len(log) - 1), f"{scores.edges[-1]:.3g}")]
    parts += [
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(max(at, 22), BOTTOM + 16, tick)
        for at, tick in ticks
    ]
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">score</text>').format((LEFT + RIGHT) / 2, BOTTOM + 32)
    )
    label = (
        f"Scores of {sum(log)} rows, {sum(scores.flagged)} of them flagged, and of {sum(scores.calibration)} clean rows"
    )
    return Markup('<svg class="figure" role="img" aria-label="{}" viewBox="0 0 {} {}">{}</svg>').format(
        label, WIDTH, HEIGHT, Markup("").join(parts)
    )


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) or 1
    return [count / total for count in counts]


def _shares_text(group: InputGroup, no_text: bool) -> str:
    return visible(watch_text.shares(group, no_text))


def _bins(scores: Histogram) -> list[tuple[str, int, int, int]]:
    """The figure as numbers: bins with rows in them."""
    ends = [f"to {edge:.3g}" for edge in scores.edges] + [f"beyond {scores.edges[-1]:.3g}"]
    rows = zip(ends, scores.calibration, scores.unflagged, scores.flagged, strict=True)
    return [row for row in rows if any(row[1:])]


def _shaded(one: Flagged) -> Markup:
    """Tokens around the span, each as dark as it scores."""
    finite = [score for score in one.token_scores if math.isfinite(score)]
    highest = max(finite, default=0.0)
    shades = tuple(
        (score / highest if highest > 0 else 0.0) if math.isfinite(score) else float(score > 0)
        for score in one.token_scores
    )
    return shaded(ShadedRow(tokens=one.tokens, shades=shades, score=0.0, answer_at=-1))
