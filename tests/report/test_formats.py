"""Every format holds the same content, and no foreign text gets out of its place."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehunt.audit.verdict import Verdict
from molehunt.errors import InvalidInput
from molehunt.report.html import dot, heat_map, shaded, to_html
from molehunt.report.machine import from_json, to_json, to_sarif, write_report
from molehunt.report.markdown import number, to_markdown
from molehunt.report.schema import Context, Measure
from molehunt.report.visible import visible
from report_samples import empty, sample

HOSTILE = "<script>alert(1)</script></style><img src=x onerror=alert(1)> {{7*7}} \" ' | `x` \x1b[31m \u202e \0"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [name for name, _ in attrs]


def tags(page: str) -> Tags:
    parser = Tags()
    parser.feed(page)
    return parser


def test_hostile_text_adds_no_element_and_stays_visible() -> None:
    plain, hostile = tags(to_html(sample(" "))), tags(to_html(sample(HOSTILE)))
    assert "script" not in hostile.seen and "img" not in hostile.seen
    assert not [a for a in hostile.attributes if a.startswith("on")]
    # marks for words that the base's answer lacks may be more; nothing else is
    assert {t for t in hostile.seen} == {t for t in plain.seen}
    page = to_html(sample(HOSTILE))
    assert "&lt;script&gt;" in page and "{{7*7}}" in page
    assert "\x1b" not in page and "\u202e" not in page and "⟦U+202E⟧" in page and "␛" in page


def test_markdown_cannot_be_broken_out_of() -> None:
    text = to_markdown(sample(HOSTILE))
    prose = [
        line for line in text.splitlines() if not line.startswith("    ")
    ]  # an indented block is code, shown as it is
    assert not any("<script" in line or "<img" in line for line in prose)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert cells <= {
        len(re.findall(r"(?<!\\)\|", row)) for row in to_markdown(sample()).splitlines() if row.startswith("|")
    }


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_verdict_has_a_page_and_none_says_safe(verdict: Verdict) -> None:
    for report in (replace(sample(), verdict=verdict), replace(empty(), verdict=verdict)):
        for text in (to_html(report), to_markdown(report)):
            assert verdict.value in text and verdict.sentence in text
            assert not re.search(r"\bsafe\b", text, re.IGNORECASE)


def test_exit_codes() -> None:
    assert [v.exit_code for v in Verdict] == [1, 1, 0, 3, 4]


def test_the_page_is_one_file_under_a_strict_policy() -> None:
    page = to_html(sample())
    assert "default-src 'none'" in page
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert len(page.encode()) < 500_000


def test_sections_come_in_order() -> None:
    page = to_html(sample())
    order = ["verdict", "evidence", "where", "contexts", "causal", "holds", "cost", "limits", "appendix"]
    assert re.findall(r'<section[^>]* id="(\w+)"', page) == order


@given(st.text(max_size=40))
def test_json_reads_back_to_the_same_report(text: str) -> None:
    report = sample(text)
    assert from_json(to_json(report)) == report


def test_json_has_the_promised_fields() -> None:
    told = json.loads(to_json(sample()))
    assert told["schema_version"] == 1 and told["verdict"] == "FLAGGED-CAUSAL"
    finding = told["findings"][0]
    assert {
        "id",
        "kind",
        "site",
        "score",
        "interval",
        "chance",
        "baseline",
        "fpr",
        "causal",
        "contexts",
    } <= finding.keys()
    assert {"before", "after", "control"} <= finding["causal"].keys()
    assert {"seconds", "peak_rss_mb", "tokens"} == told["cost"].keys()
    assert {"name", "status", "why"} <= told["checks"][0].keys()
    assert told["inputs"].keys() == {"base", "tuned"} and told["reproduce"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"findings": 3}', '{"findings": [], "x": 1}'])
def test_what_is_no_report(text: str) -> None:
    with pytest.raises(InvalidInput, match="no report"):
        from_json(text)


def test_sarif_has_what_the_standard_demands() -> None:
    log = json.loads(to_sarif(sample()))
    assert log["version"] == "2.1.0"
    run = log["runs"][0]
    ids = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert len(run["results"]) == 2  # a finding and a flagged file; notes are no results
    for result in run["results"]:
        assert result["ruleId"] in ids and result["message"]["text"] and result["level"] in ("error", "warning")


def test_all_four_are_written(tmp_path: Path) -> None:
    page = write_report(sample(), tmp_path / "run")
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.json", "report.md", "report.sarif"]


def test_a_result_without_its_controls_is_refused() -> None:
    finding = sample().findings[0]
    for field in ("score", "chance", "baseline"):
        with pytest.raises(ValueError, match="control row"):
            replace(finding, **{field: Measure(value=0.5)})
    with pytest.raises(ValueError, match="shades"):
        Context(tokens=("a",), shades=(), score=0.0)


@given(st.text())
def test_visible_text_has_no_control_characters(text: str) -> None:
    import unicodedata

    shown = visible(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cf") for c in shown)


def test_a_cut_says_how_much_is_missing() -> None:
    assert visible("x" * 20, limit=5) == "xxxxx … (15 characters more)"
    assert visible("a\nb", keep_lines=True) == "a\nb" and visible("a\nb") == "a␊b"
    long = Context(tokens=("word ",) * 400, shades=(0.5,) * 400, score=0.0)
    assert "tokens more" in shaded(long)


def test_drawings() -> None:
    heat = sample().heat
    assert heat is not None
    assert heat_map(heat).count("<rect") == len(heat.cells)
    assert heat_map(replace(heat, cells=heat.cells[:1])).count("<rect") == 1
    assert dot(None) == "" and "<circle" in dot(Measure(value=2.0))
    assert "interval" not in dot(Measure(value=0.5)) and "chance" in dot(Measure(value=0.5), Measure(value=0.1))
    assert number(None) == "–" and number(Measure(value=0.5)) == "0.50"
