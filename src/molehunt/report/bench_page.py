"""A benchmark's board as one self-contained page and as Markdown: every foreign name escaped, one hashed script."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from molehunt.report import bench_told
from molehunt.report.bench_figures import bar, figures
from molehunt.report.bench_told import Board, Group, Row, name, num, position, ranks, short, told
from molehunt.report.html import TEMPLATES, escaping
from molehunt.report.markdown import cell


def render_board(board: Mapping[str, Any]) -> str:
    """The page. Its links are relative to the benchmark's folder, where `organisms/` and `units/` lie.

    Args:
        board: from `bench.leaderboard.leaderboard`; `published`, where it is there, holds results of
            `bench.published.run_published`, which are drawn under the ceiling of their score.
    """
    environment = escaping(TEMPLATES)
    attacks = bench_told.attack_names(board)

    def by(row: Row) -> str:
        return json.dumps(bench_told.by_attack(row, attacks), separators=(",", ":"))

    filters: dict[str, Any] = {
        "name": name, "short": short, "told": told, "ranks": ranks, "position": position, "bar": bar, "by": by,
        "link": bench_told.link, "count": count,
    }  # fmt: skip
    environment.filters.update(filters)
    css = "".join((TEMPLATES / file).read_text(encoding="utf-8") for file in ("report.css", "bench.css"))
    script = (TEMPLATES / "bench.js.j2").read_text(encoding="utf-8")
    groups = bench_told.groups(board)
    return environment.get_template("bench.html.j2").render(
        board=board,
        css=Markup(css),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sentences=bench_told.sentences(board),
        groups=groups,
        wheres=list(dict.fromkeys(str(row["where"]) for row in board["rows"])),
        attack_names=attacks,
        attacks=bench_told.attacks(board),
        rule=bench_told.rule(),
        figures=figures(board),
        causal_lead=bench_told.causal_lead(board),
        controls=bench_told.controls(board),
        fpr=bench_told.percent(bench_told.FPR),
    )


def board_markdown(board: Mapping[str, Any]) -> str:
    """The tables: the best methods and every control of R0 and R2, all rows of R1, attacks, causal effects."""
    lines = [*(cell(sentence) + "\n" for sentence in bench_told.sentences(board))]
    lines += [
        f"Thresholds are set at {bench_told.percent(bench_told.FPR)} FPR on clean text. Intervals (95 %) and ranks come from "
        "drawing organisms anew. Margin: TPR less the larger of near-miss and twin FPR.",
        "",
    ]
    for group in bench_told.groups(board):
        lines += _track(group)
    lines += ["## Attacks", "", f"Solved with labels known (R0): {bench_told.rule()}.", ""]
    head = ("attack", "verdict", "passing methods", "passing controls", "best method", "its TPR", "its near-miss FPR")
    lines += _table(
        head,
        [
            (a.name, "open" if a.open else "solved", _passing(a.passing), _passing(a.controls), a.best,
             short(a.best_tpr), short(a.best_near))
            for a in bench_told.attacks(board)
        ],
    )  # fmt: skip
    lines += ["## Taking it out", "", cell(bench_told.causal_lead(board)), ""]
    if board["causal"]:
        lines += _table(
            ("method", "directions", "ASR before", "ASR after", "clean loss rise"),
            _causal(board, bench_told.controls(board)),
        )
    return "\n".join(lines).rstrip() + "\n"


def _track(group: Group) -> list[str]:
    whole = group.title.startswith("R1")  # without labels nobody can choose the best row: all are shown
    left = f" {len(group.rest)} further rows are in the CSV file." if group.rest and not whole else ""
    head = ("rank", "method", "position", "TPR", "near-miss FPR", "twin FPR", "clean FPR", "AUROC", "margin")
    rows = [
        (ranks(row), name(row["method"]) + _mark(bool(row["control"])), position(row), told(row["tpr"]), short(row["near"]),
         short(row["twin"]), short(row["clean"]), short(row["auroc"]), told(row["margin"]))
        for row in (group.rows if whole else group.first)
    ]  # fmt: skip
    return [f"## {cell(group.title)}", "", f"{cell(group.note)}{left}".strip(), "", *_table(head, rows)]


def _causal(board: Board, controls: set[str]) -> list[tuple[str, ...]]:
    return [
        (
            name(row["method"]) + _mark(row["method"] in controls),
            count(row["directions"]),
            told(row["asr_before"]),
            told(row["asr_after"]),
            told(row["clean_loss_rise"]),
        )
        for row in board["causal"]
    ]


def count(value: Any) -> str:
    """A mean number of things: `4` or `4.5`."""
    found = num(value)
    return "–" if found is None else f"{found:.1f}".removesuffix(".0")


def _mark(control: bool) -> str:
    return " (control)" if control else ""


def _passing(found: Sequence[tuple[str, Sequence[str]]]) -> str:
    return "; ".join(f"{where}: {', '.join(names)}" for where, names in found) or "none"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(map(cell, row))} |" for row in rows),
        "",
    ]
