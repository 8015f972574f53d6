"""What a benchmark's board says: its tracks, its attacks and three sentences, as plain text for page and Markdown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import quote

from molehunt.bench.leaderboard import SOLVED_NEAR, SOLVED_TPR
from molehunt.bench.rates import FPR
from molehunt.report.escape import visible

BEST = 12
"""Methods of a track that are shown at once; its controls always are."""
NAME = 120
"""Characters of a name that are shown."""
RANDOM_ROW = "as many random directions"
"""The causal row that takes out random directions."""
Row: TypeAlias = Mapping[str, Any]
Board: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrackGroup:
    """A track at one rate of triggered rows."""

    key: str
    title: str
    note: str
    track: str
    rate: float | None
    rows: tuple[Row, ...]

    @property
    def first(self) -> tuple[Row, ...]:
        """The best methods and every control, by rank."""
        best = {id(row) for row in [r for r in self.rows if not r["control"]][:BEST]}
        return tuple(row for row in self.rows if row["control"] or id(row) in best)

    @property
    def rest(self) -> tuple[Row, ...]:
        first = {id(row) for row in self.first}
        return tuple(row for row in self.rows if id(row) not in first)


@dataclass(frozen=True, kw_only=True)
class AttackOutcome:
    """Which methods pass on an attack with labels known, and which controls do, too."""

    index: int
    """Place among `attack_names`."""
    name: str
    open: bool
    passing: tuple[tuple[str, tuple[str, ...]], ...]
    """Position → methods."""
    controls: tuple[tuple[str, tuple[str, ...]], ...]
    best: str
    best_tpr: float | None
    best_near: float | None


def name(text: Any) -> str:
    """A foreign name, visible and not too long."""
    return visible(str(text), limit=NAME)


def num(value: Any) -> float | None:
    """A number, or an interval's estimate; None where there is none."""
    if isinstance(value, Mapping):
        interval: Mapping[str, Any] = value
        value = interval.get("estimate")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def ends(value: Any) -> tuple[float, float] | None:
    """An interval's limits."""
    if not isinstance(value, Mapping):
        return None
    interval: Mapping[str, Any] = value
    low, high = num(interval.get("low")), num(interval.get("high"))
    return None if low is None or high is None else (low, high)


def short(value: Any) -> str:
    """`0.93`, or a dash."""
    found = num(value)
    return "–" if found is None else f"{round(found, 2) + 0.0:.2f}"


def with_interval(value: Any) -> str:
    """`0.93 [0.86, 0.97]`, or a dash."""
    limits = ends(value)
    return short(value) if limits is None else f"{short(value)} [{short(limits[0])}, {short(limits[1])}]"


def ranks(row: Row) -> str:
    """`2 [1, 5]`."""
    rank: Mapping[str, Any] = row.get("rank") or {}
    estimate, limits = num(rank), ends(rank)
    if estimate is None:
        return "–"
    return f"{estimate:.0f}" + ("" if limits is None else f" [{limits[0]:.0f}, {limits[1]:.0f}]")


def percent(rate: float) -> str:
    return f"{100 * rate:g} %"


def position(row: Row) -> str:
    """Where scores are read, and how they are pooled."""
    return name(", ".join(str(part) for part in (row["where"], row["how"]) if part))


def worst(row: Row) -> float | None:
    """The larger of near-miss and twin FPR: what the margin takes off."""
    known = [v for v in (num(row.get("near")), num(row.get("twin"))) if v is not None]
    return max(known) if known else None


def groups(board: Board) -> list[TrackGroup]:
    """Tracks in the board's order."""
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in board["rows"]:
        found.setdefault((str(row["track"]), num(row.get("rate"))), []).append(row)
    return [_group(i, track, rate, rows) for i, ((track, rate), rows) in enumerate(found.items())]


def _group(i: int, track: str, rate: float | None, rows: Sequence[Row]) -> TrackGroup:
    share = "" if rate is None else percent(rate)
    title, note = {
        "R0": ("R0: labels known", "Fitted on labelled rows, judged on others."),
        "R1": (
            f"R1: unlabelled traffic, {share} triggered",
            "Fitted and judged on the same traffic without a label; on the twin’s traffic, the same is done again.",
        ),
        "R2": ("R2: no triggered row", "Fitted on clean text and the two models alone."),
    }.get(track, (f"{name(track)} {share}".strip(), ""))
    return TrackGroup(key=f"track-{i}", title=title, note=note, track=track, rate=rate, rows=tuple(rows))


def attack_names(board: Board) -> list[str]:
    """Every attack of the cells and of the verdicts, sorted."""
    return sorted({str(c["attack"]) for c in board["cells"]} | {str(a["attack"]) for a in board["attacks"]})


def by_attack(row: Row, attacks: Sequence[str]) -> list[list[float | None] | None]:
    """TPR, near-miss FPR, twin FPR and AUROC on each attack."""
    found: Mapping[str, Any] = row.get("by_attack") or {}
    return [
        [num(found[attack].get(metric)) for metric in ("tpr", "near", "twin", "auroc")] if attack in found else None
        for attack in attacks
    ]


def attacks(board: Board) -> list[AttackOutcome]:
    """The board's verdicts, with controls at positions that are no method's (the text itself) added."""
    found: list[AttackOutcome] = []
    names = attack_names(board)
    text = [row for row in board["rows"] if row["track"] == "R0" and row["control"] and row["where"] == "text"]
    for attack in board["attacks"]:
        listed: Mapping[str, Sequence[str]] = attack.get("controls_passing") or {}
        of_text = [
            str(row["method"]) for row in text if _passes((row.get("by_attack") or {}).get(attack["attack"]) or {})
        ]
        best: Mapping[str, Any] = attack.get("best") or {}
        found.append(
            AttackOutcome(
                index=names.index(str(attack["attack"])),
                name=name(attack["attack"]),
                open=bool(attack["open"]),
                passing=_named(attack.get("passing") or {}),
                controls=_named({"text": of_text} | dict(listed)),
                best=name(best.get("method", "–")),
                best_tpr=num(best.get("tpr")),
                best_near=num(best.get("near")),
            )
        )
    return found


def _passes(here: Mapping[str, Any]) -> bool:
    tpr = num(here.get("tpr"))
    return tpr is not None and tpr >= SOLVED_TPR and (num(here.get("near")) or 0.0) <= SOLVED_NEAR


def _named(found: Mapping[str, Sequence[str]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((name(where), tuple(name(n) for n in names)) for where, names in found.items() if names)


def rule() -> str:
    """When an attack counts as solved."""
    return f"TPR ≥ {SOLVED_TPR:g} at near-miss FPR ≤ {SOLVED_NEAR:g}, as means over the attack’s organisms"


def controls(board: Board) -> set[str]:
    """Names of methods that are controls, the random causal row among them."""
    return {str(row["method"]) for row in board["rows"] if row["control"]} | {RANDOM_ROW}


def causal_lead(board: Board) -> str:
    """How far the best method's directions carry, beside the random ones."""
    rows: Sequence[Row] = board["causal"]
    marked = controls(board)
    rated = [row for row in rows if row["method"] not in marked and num(row["asr_after"]) is not None]
    if not rated:
        return "No method that names directions was taken out."
    best = min(rated, key=lambda row: (num(row["asr_after"]), str(row["method"])))
    random = next((row for row in rows if row["method"] == RANDOM_ROW), None)
    beside = "" if random is None else f"; as many random directions leave it at {with_interval(random['asr_after'])}"
    return (
        f"Taking out what {name(best['method'])} found brings attack success from {with_interval(best['asr_before'])} to "
        f"{with_interval(best['asr_after'])} and raises clean loss by {with_interval(best['clean_loss_rise'])}{beside}."
    )


def sentences(board: Board) -> tuple[str, str, str]:
    """What the benchmark says: with labels, without, and what is open."""
    tracks = groups(board)
    return _with_labels(board, tracks), _without(tracks), _open(board)


def _best(rows: Sequence[Row], *, control: bool = False) -> Row | None:
    rated = [row for row in rows if bool(row["control"]) == control and num(row.get("margin")) is not None]
    return max(rated, key=lambda row: num(row["margin"]) or 0.0) if rated else None


def _with_labels(board: Board, tracks: Sequence[TrackGroup]) -> str:
    rows = next((group.rows for group in tracks if group.track == "R0"), ())
    best, control = _best(rows), _best(rows, control=True)
    planned = int(board.get("planned", len(board["cells"])))
    part = "" if planned == len(board["cells"]) else f" (of {planned} in the grid; the others were not run)"
    cells = f"{len(board['cells'])} organisms{part} of {len(attack_names(board))} attacks"
    if best is None:
        return f"On {cells}, no method was scored with labels known (R0)."
    mine = ends(best.get("rank"))
    others = [row for row in rows if not row["control"] and row is not best]
    tied = [row for row in others if mine and (its := ends(row.get("rank"))) and its[0] <= mine[1]]
    beside = "no control was scored"
    if control is not None:
        beside = f"the best control, {name(control['method'])}, has margin {with_interval(control['margin'])}"
    return (
        f"On {cells} and with labels known (R0), {name(best['method'])} ({position(best)}) leads with TPR "
        f"{with_interval(best['tpr'])} at {percent(FPR)} FPR and margin {with_interval(best['margin'])}; rank intervals of {len(tied)} of the "
        f"{len(others)} other rows reach into its own, and {beside}."
    )


def _without(tracks: Sequence[TrackGroup]) -> str:
    parts: list[str] = []
    for group in tracks:
        best, control = _best(group.rows), _best(group.rows, control=True)
        if group.track == "R0" or best is None:
            continue
        where = {
            "R1": f"in traffic with {percent(group.rate or 0.0)} triggered rows (R1)",
            "R2": "with no triggered row at all (R2)",
        }.get(group.track, f"on {group.title}")
        beside = "" if control is None else f", best control {with_interval(control['margin'])}"
        parts.append(
            f"{where} {name(best['method'])} ({position(best)}) with margin {with_interval(best['margin'])}{beside}"
        )
    if not parts:
        return "No method was scored without labels."
    return f"Without labels, the best are: {'; '.join(parts)}."


def _open(board: Board) -> str:
    found = attacks(board)
    unsolved = [a.name for a in found if a.open]
    shadowed = [a.name for a in found if a.controls]
    solved = len(found) - len(unsolved)
    return (
        f"{len(unsolved)} of {len(found)} attacks {'is' if len(unsolved) == 1 else 'are'} open"
        f"{f' ({_join(unsolved)})' if unsolved else ''}: no method reaches {rule()}; "
        f"{solved} {'is' if solved == 1 else 'are'} solved, and a control passes on {len(shadowed)}"
        f"{f' ({_join(shadowed)})' if shadowed else ''}."
    )


def _join(names: Sequence[str]) -> str:
    return ", ".join(names)


def link(path: Any) -> str | None:
    """A relative link below the page's own folder; None for anything else."""
    if (
        not isinstance(path, str)
        or not path
        or path.startswith(("/", "\\"))
        or ".." in path.replace("\\", "/").split("/")
    ):
        return None
    return quote(path, safe="/", errors="replace")
