"""A benchmark's board as one self-contained page and as Markdown: every foreign name escaped, one hashed script."""

import base64
import hashlib
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from molehunt.report import bench_text
from molehunt.report.bench_figures import bar, figures
from molehunt.report.bench_lead import board_lead
from molehunt.report.bench_text import Board, Row, TrackGroup, name, num, position, ranks, short, with_interval
from molehunt.report.escape import cell
from molehunt.report.html import TEMPLATES, escaping

LINE = 116
"""Greatest length of a line of prose in Markdown."""


def render_board(board: Mapping[str, Any]) -> str:
    """The page. Its links are relative to the benchmark's folder, where `organisms/` and `units/` lie.

    Args:
        board: from `bench.leaderboard.leaderboard`; `published`, where it is there, holds results of
            `bench.published.run_published`, which are drawn under the ceiling of their score.
    """
    environment = escaping(TEMPLATES)
    attacks = bench_text.attack_names(board)

    def by(row: Row) -> str:
        return json.dumps(bench_text.by_attack(row, attacks), separators=(",", ":"))

    filters: dict[str, Any] = {
        "name": name, "short": short, "with_interval": with_interval, "ranks": ranks, "position": position, "bar": bar, "by": by,
        "link": bench_text.link, "count": count,
    }  # fmt: skip
    environment.filters.update(filters)
    css = "".join((TEMPLATES / file).read_text(encoding="utf-8") for file in ("report.css", "bench.css"))
    script = (TEMPLATES / "bench.js.j2").read_text(encoding="utf-8")
    groups = bench_text.groups(board)
    return environment.get_template("bench.html.j2").render(
        board=board,
        css=Markup(css),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sentences=[" ".join(board_lead(board)), *bench_text.sentences(board)],
        groups=groups,
        wheres=list(dict.fromkeys(str(row["where"]) for row in board["rows"])),
        attack_names=attacks,
        attacks=bench_text.attacks(board),
        rule=bench_text.rule(),
        figures=figures(board),
        causal_lead=bench_text.causal_lead(board),
        controls=bench_text.controls(board),
        fpr=bench_text.percent(bench_text.FPR),
    )


def board_markdown(board: Mapping[str, Any]) -> str:
    """The tables: the best methods and every control of R0 and R2, all rows of R1, attacks, causal effects."""
    lead = " ".join(board_lead(board))
    lines = [line for sentence in (lead, *bench_text.sentences(board)) for line in (*prose(cell(sentence)), "")]
    lines += [
        *prose(
            f"Thresholds are set at {bench_text.percent(bench_text.FPR)} FPR on clean text. Intervals (95 %) and ranks come "
            "from resampling organisms. Margin: TPR less the larger of near-miss and twin FPR."
        ),
        "",
    ]
    for group in bench_text.groups(board):
        lines += _track(group)
    lines += _attacks(board)
    lines += ["## Taking it out", "", *prose(cell(bench_text.causal_lead(board))), ""]
    if board["causal"]:
        lines += _table(
            ("method", "directions", "ASR before", "ASR after", "clean loss rise"),
            _causal(board, bench_text.controls(board)),
        )
    return "\n".join(lines).rstrip() + "\n"


def prose(text: str) -> list[str]:
    """Markdown text in lines of at most `LINE` characters. No line starts as a heading, list or quotation would."""
    first, *rest = textwrap.wrap(text, LINE, break_long_words=False, break_on_hyphens=False) or [""]
    marks = (re.sub(r"^([#>+\-*=|~`])", r"\\\1", line) for line in rest)
    return [first, *(re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line) for line in marks)]


def _attacks(board: Board) -> list[str]:
    """A table of the attacks, and below it which methods and controls pass on each."""
    found = bench_text.attacks(board)
    head = ("attack", "verdict", "passing methods", "passing controls", "best method", "its TPR", "its near-miss FPR")
    rows = [
        (one.name, "open" if one.open else "solved", _number(one.passing), _number(one.controls), one.best,
         short(one.best_tpr), short(one.best_near))
        for one in found
    ]  # fmt: skip
    lines = ["## Attacks", "", *prose(f"Solved with labels known (R0): {bench_text.rule()}."), "", *_table(head, rows)]
    for one in found:
        passing = (
            f"{one.name}: methods that pass: {_passing(one.passing)}. Controls that pass: {_passing(one.controls)}."
        )
        first, *rest = prose(cell(passing))
        lines += [f"- {first}", *(f"  {line}" for line in rest)]
    return [*lines, ""]


def _track(group: TrackGroup) -> list[str]:
    whole = group.title.startswith("R1")  # without labels nobody can choose the best row: all are shown
    left = f" {len(group.rest)} further rows are in the CSV file." if group.rest and not whole else ""
    head = ("rank", "method", "position", "TPR", "near-miss FPR", "twin FPR", "clean FPR", "AUROC", "margin")
    rows = [
        (ranks(row), name(row["method"]) + _mark(bool(row["control"])), position(row), with_interval(row["tpr"]), short(row["near"]),
         short(row["twin"]), short(row["clean"]), short(row["auroc"]), with_interval(row["margin"]))
        for row in (group.rows if whole else group.first)
    ]  # fmt: skip
    note = prose(f"{cell(group.note)}{left}".strip())
    return [f"## {cell(group.title)}", "", *note, "", *_table(head, rows)]


def _causal(board: Board, controls: set[str]) -> list[tuple[str, ...]]:
    return [
        (
            name(row["method"]) + _mark(row["method"] in controls),
            count(row["directions"]),
            with_interval(row["asr_before"]),
            with_interval(row["asr_after"]),
            with_interval(row["clean_loss_rise"]),
        )
        for row in board["causal"]
    ]


def count(value: Any) -> str:
    """A mean count, such as `4` or `4.5`."""
    found = num(value)
    return "–" if found is None else f"{found:.1f}".removesuffix(".0")


def _mark(control: bool) -> str:
    return " (control)" if control else ""


def _passing(found: Sequence[tuple[str, Sequence[str]]]) -> str:
    return "; ".join(f"{where}: {', '.join(names)}" for where, names in found) or "none"


def _number(found: Sequence[tuple[str, Sequence[str]]]) -> str:
    return str(sum(len(names) for _, names in found))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(map(cell, row))} |" for row in rows),
        "",
    ]
