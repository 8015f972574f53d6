"""The benchmark's figures as inline SVG: detection by depth, by rate of triggers, and the ceiling of a published score."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from molehunt.report.bench_text import Board, Row, ends, name, num, percent, position, short, with_interval, worst

WIDTH, HEIGHT = 330, 236
LEFT, RIGHT, TOP, BOTTOM = 34, 318, 10, 200
SERIES = 6
"""Lines in one drawing; each has a colour and a mark of its own."""
BAR = 104
PREVALENCE = 0.2
"""Share of triggered rows in the published evaluation, where the board does not say."""
PUBLISHED_Q = 0.05
AT_CEILING = 0.99
NO_TRAINING = ("no model", "untrained", "one random")
"""How rows of the published protocol begin that no training on the organism is behind."""
KINDS = (("organism", "on the organism"), ("twin", "on the clean twin"), ("none", "untrained, random or no model"))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing, its key, what it says, and its numbers as a table."""

    id: str
    title: str
    drawing: Markup
    caption: str
    key: tuple[tuple[Markup, str], ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = field(default=())


def figures(board: Board) -> list[Figure]:
    """Every figure that the board has numbers for."""
    return [f for f in (by_depth(board), by_rate(board), ceiling(board)) if f is not None]


def bar(row: Row) -> Markup:
    """TPR with its interval on a 0 to 1 line, and a tick at the worst FPR: what lies between them is the margin."""
    estimate, limits, tick = num(row.get("tpr")), ends(row.get("tpr")), worst(row)
    if estimate is None:
        return Markup("")

    def x(value: float) -> float:
        return round(6 + (BAR - 12) * min(1.0, max(0.0, value)), 1)

    parts = [Markup('<line class="axis" x1="6" x2="{}" y1="8" y2="8"/>').format(BAR - 6)]
    if limits is not None:
        parts.append(
            Markup('<line class="interval" x1="{}" x2="{}" y1="8" y2="8"/>').format(x(limits[0]), x(limits[1]))
        )
    parts.append(Markup('<circle class="dot" cx="{}" cy="8" r="4.5"/>').format(x(estimate)))
    if tick is not None:
        parts.append(Markup('<line class="chance" x1="{0}" x2="{0}" y1="1" y2="15"/>').format(x(tick)))
    return Markup('<svg class="measure" aria-hidden="true" width="{}" height="16">{}</svg>').format(
        BAR, Markup("").join(parts)
    )


def by_depth(board: Board) -> Figure | None:
    """TPR by relative layer. Where models differ in their number of layers, each fifth of the depth is averaged."""
    depths = sorted({d for row in board["layers"] if (d := num(row["depth"])) is not None})
    n = len(depths)
    even = all(abs(d - (i + 1) / n) < 2e-3 for i, d in enumerate(depths))
    gathered: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for row in board["layers"]:
        depth, tpr = num(row["depth"]), num(row["tpr"])
        if depth is None or tpr is None:
            continue
        at = depth if even else max(1, math.ceil(5 * depth - 0.01)) / 5
        gathered.setdefault(str(row["method"]), {}).setdefault(at, []).append((tpr, num(row.get("cells")) or 1.0))
    lines = {
        method: {at: sum(t * w for t, w in pairs) / sum(w for _, w in pairs) for at, pairs in sorted(found.items())}
        for method, found in gathered.items()
    }
    if not lines:
        return None
    best_methods = sorted(lines, key=lambda m: (-max(lines[m].values()), m))[:SERIES]
    ats = sorted({at for method in best_methods for at in lines[method]})
    drawn = [_grid(), *(_tick(_x(at), f"{at:.2g}") for at in ats), _axis_name("relative layer")]
    drawn += [_line(i, [(_x(at), _y(tpr), None) for at, tpr in lines[m].items()]) for i, m in enumerate(best_methods)]
    best = max(((lines[m][at], at, m) for m in best_methods for at in lines[m]), key=lambda found: found[0])
    how = "" if even else " Models differ in their number of layers, so each point averages a fifth of the depth."
    less = (
        "" if len(best_methods) == len(lines) else f" The best {len(best_methods)} of {len(lines)} methods are drawn."
    )
    return Figure(
        id="depth",
        title="Detection by layer",
        drawing=_svg("TPR by relative layer", drawn),
        caption=f"TPR at the decision position with labels known: highest, {best[0]:.2f}, for {name(best[2])} at relative "
        f"layer {best[1]:.2g}.{how}{less}",
        key=tuple((_swatch(i), name(m)) for i, m in enumerate(best_methods)),
        head=("relative layer", *(name(m) for m in best_methods)),
        rows=tuple((f"{at:.2g}", *(short(lines[m].get(at)) for m in best_methods)) for at in ats),
    )


def by_rate(board: Board) -> Figure | None:
    """TPR on R1 as triggers become rarer: the best methods, each where it does best, and the best control."""
    found: dict[tuple[str, str, str], dict[float, Row]] = {}
    for row in board["rows"]:
        rate = num(row.get("rate"))
        if row["track"] == "R1" and rate is not None and num(row.get("tpr")) is not None:
            found.setdefault((str(row["method"]), str(row["where"]), str(row["how"])), {})[rate] = row
    rates = sorted({rate for rows in found.values() for rate in rows}, reverse=True)
    if not rates:
        return None

    def rated(rows: Mapping[float, Row]) -> float:
        return sum(num(rows[r].get("margin")) or 0.0 if r in rows else -1.0 for r in rates) / len(rates)

    methods: dict[str, dict[float, Row]] = {}
    for rows in sorted(found.values(), key=lambda rows: -rated(rows)):
        methods.setdefault(str(next(iter(rows.values()))["method"]), rows)
    tried = [m for m, rows in methods.items() if not _control(rows)]
    best_methods = tried[: SERIES - 1] + [m for m, rows in methods.items() if _control(rows)][:1]
    places = {rate: LEFT + (RIGHT - LEFT) * (i + 0.5) / len(rates) for i, rate in enumerate(rates)}
    drawn = [
        _grid(),
        *(_tick(places[rate], percent(rate)) for rate in rates),
        _axis_name("share of triggered rows"),
    ]
    for i, method in enumerate(best_methods):
        shift = 5 * (i - (len(best_methods) - 1) / 2)
        points = [
            (places[rate] + shift, _y(num(row["tpr"])), ends(row["tpr"])) for rate, row in _falling(methods[method])
        ]
        drawn.append(_line(i, points, dashed=_control(methods[method])))
    labels = tuple(_label(methods[method]) for method in best_methods)
    return Figure(
        id="rate",
        title="Detection without labels as triggers become rarer",
        drawing=_svg("TPR on R1 by share of triggered rows", drawn),
        caption="TPR on R1 with its interval over organisms, for the best methods by mean margin, each at its best position; "
        "dashed, the best control.",
        key=tuple((_swatch(i), label) for i, label in enumerate(labels)),
        head=("triggered rows", *labels),
        rows=tuple(
            (
                percent(rate),
                *(with_interval(methods[m][rate]["tpr"]) if rate in methods[m] else "–" for m in best_methods),
            )
            for rate in rates
        ),
    )


def _control(rows: Mapping[float, Row]) -> bool:
    return bool(next(iter(rows.values()))["control"])


def _label(rows: Mapping[float, Row]) -> str:
    row = next(iter(rows.values()))
    return f"{name(row['method'])} ({position(row)}){', control' if row['control'] else ''}"


def _falling(rows: Mapping[float, Row]) -> list[tuple[float, Row]]:
    return sorted(rows.items(), key=lambda item: -item[0])


@dataclass(frozen=True)
class _Point:
    q: float
    bis: float
    kind: str


def ceiling(board: Board) -> Figure:
    """The highest BIS any feature can reach when a share q of rows fires, with what was measured on top."""
    published = _published(board)
    prevalence = next((p for result in published if (p := _prevalence(result)) is not None), PREVALENCE)
    low = min(0.01, prevalence / 4)

    def x(q: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log(q / low) / math.log(prevalence / low)

    steps = [low * (prevalence / low) ** (i / 48) for i in range(49)]
    path = " ".join(f"{x(q):.1f},{_y(_ceiling(q, prevalence)):.1f}" for q in steps)
    ticks = [q for q in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if low <= q <= prevalence + 1e-9]
    drawn = [_grid(), *(_tick(x(q), f"{q:g}") for q in ticks), _axis_name("q, the share of rows that fires")]
    drawn.append(Markup('<polyline class="ceiling" points="{}"/>').format(path))
    head, rows = ("q", "ceiling 2q/(q+π)"), [(f"{q:g}", f"{_ceiling(q, prevalence):.2f}") for q in ticks]
    caption = f"No feature can score above the line, 2q/(q+π), with π = {prevalence:.2g} of rows triggered."
    if prevalence > PUBLISHED_Q:
        top = _ceiling(PUBLISHED_Q, prevalence)
        drawn.append(Markup('<line class="published" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2:.1f}"/>').format(
            x(PUBLISHED_Q), BOTTOM, _y(top)))  # fmt: skip
        caption += f" At the published q = {PUBLISHED_Q:g} that is {top:.2f}."
    points = [p for p in _points(published) if low <= p.q <= prevalence + 1e-9]
    key: list[tuple[Markup, str]] = []
    for i, (kind, label) in enumerate(KINDS):
        here = [p for p in points if p.kind == kind]
        drawn += [_mark(i, x(p.q) + 6 * (i - 1), _y(p.bis)) for p in here]
        if here:
            key.append((_swatch(i, line=False), label))
    at = [p for p in points if abs(p.q - PUBLISHED_Q) < 1e-9]
    reach = [p for p in at if p.bis >= AT_CEILING * _ceiling(p.q, prevalence)]
    if at:
        none = sum(p.kind != "organism" for p in reach)
        caption += (
            f" {len(reach)} of {len(at)} measured rows reach {percent(AT_CEILING)} of it, {none} of them on a clean twin, "
            "untrained, random or without a model."
        )
    return Figure(
        id="ceiling", title="The ceiling of the published score (BIS)", drawing=_svg("BIS ceiling by q", drawn),
        caption=caption, key=tuple(key), head=head, rows=tuple(rows),
    )  # fmt: skip


def _ceiling(q: float, prevalence: float) -> float:
    return 2 * q / (q + prevalence)


def _published(board: Board) -> list[Mapping[str, Any]]:
    """Results of `bench.published.run_published`: one or several, or none."""
    found: Any = board.get("published") or ()
    return [found] if isinstance(found, Mapping) else [result for result in found if isinstance(result, Mapping)]


def _prevalence(result: Mapping[str, Any]) -> float | None:
    top = num(result.get("ceiling"))
    if top is None or not 0 < top <= 1:
        return None
    return 2 * PUBLISHED_Q / top - PUBLISHED_Q


def _points(published: Sequence[Mapping[str, Any]]) -> list[_Point]:
    """The best BIS over sites of each method on each model."""
    best: dict[tuple[str, str, str, float], float] = {}
    for result in published:
        rows: Sequence[Row] = result.get("rows") or ()
        for row in rows:
            if row.get("text", "whole") != "whole":
                continue
            method = str(row.get("method", ""))
            side = "twin" if result.get("side") == "twin" else "organism"
            kind = "none" if method.startswith(NO_TRAINING) else side
            sweep: Mapping[str, Any] = row.get("sweep") or {str(PUBLISHED_Q): row.get("bis")}
            for q, value in sweep.items():
                bis = num(value)
                if bis is not None:
                    key = (f"{result.get('cell')}/{side}", method, kind, float(q))
                    best[key] = max(bis, best.get(key, 0.0))
    return [_Point(q, bis, kind) for (_, _, kind, q), bis in best.items()]


def _x(share: float) -> float:
    return LEFT + (RIGHT - LEFT) * share


def _y(value: float | None) -> float:
    return BOTTOM - (BOTTOM - TOP) * min(1.0, max(0.0, value or 0.0))


def _svg(label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="figure" role="img" aria-label="{}" viewBox="0 0 {} {}">{}</svg>').format(
        label, WIDTH, HEIGHT, Markup("").join(parts)
    )


def _grid() -> Markup:
    lines = [
        Markup('<line class="rule" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(LEFT, RIGHT, y=_y(v))
        + Markup('<text x="{}" y="{:.1f}" text-anchor="end">{:g}</text>').format(LEFT - 6, _y(v) + 4, v)
        for v in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    return Markup("").join(lines)


def _tick(x: float, label: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x, BOTTOM + 16, label)


def _axis_name(label: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format((LEFT + RIGHT) / 2, HEIGHT - 4, label)


def _line(i: int, points: Sequence[tuple[float, float, tuple[float, float] | None]], *, dashed: bool = False) -> Markup:
    """A series: its line, intervals and marks."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    parts = [Markup('<polyline class="q{}{}" points="{}"/>').format(i, " dashed" if dashed else "", path)]
    for x, _, limits in points:
        if limits is not None:
            parts.append(Markup('<line class="q{} span" x1="{x:.1f}" x2="{x:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
                i, _y(limits[0]), _y(limits[1]), x=x))  # fmt: skip
    return Markup("").join([*parts, *(_mark(i, x, y) for x, y, _ in points)])


MARKS: tuple[Callable[[float, float], str], ...] = (
    lambda x, y: f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    lambda x, y: f"M{x - 3.6:.1f} {y - 3.6:.1f}h7.2v7.2h-7.2z",
    lambda x, y: f"M{x:.1f} {y - 5:.1f}l4.6 8.4h-9.2z",
    lambda x, y: f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z",
    lambda x, y: f"M{x:.1f} {y + 5:.1f}l4.6 -8.4h-9.2z",
    lambda x, y: f"M{x - 4:.1f} {y - 1.5:.1f}h8v3h-8z",
)


def _mark(i: int, x: float, y: float) -> Markup:
    return Markup('<path class="m{}" d="{}"/>').format(i, MARKS[i](x, y))


def _swatch(i: int, *, line: bool = True) -> Markup:
    drawn = Markup('<line class="q{}" x1="1" x2="25" y1="7" y2="7"/>').format(i) if line else Markup("")
    return Markup('<svg width="26" height="14" aria-hidden="true">{}{}</svg>').format(drawn, _mark(i, 13.0, 7.0))
