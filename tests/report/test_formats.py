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
from molehunt.report.escape import number, visible
from molehunt.report.figures import dot, heat_map
from molehunt.report.html import shaded, to_html, to_notebook
from molehunt.report.machine import from_json, from_version_1, to_dict, to_json, to_sarif, write_report
from molehunt.report.markdown import to_markdown
from molehunt.report.schema import Measure, ShadedRow
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
    order = ["verdict", "evidence", "where", "contexts", "causal", "robustness", "cost", "limits", "appendix"]
    assert re.findall(r'<section[^>]* id="(\w+)"', page) == order


@given(st.text(max_size=40))
def test_json_reads_back_to_the_same_report(text: str) -> None:
    report = sample(text)
    assert from_json(to_json(report)) == report


def test_json_has_the_promised_fields() -> None:
    payload = json.loads(to_json(sample()))
    assert payload == to_dict(sample())
    assert payload["schema_version"] == 2 and payload["verdict"] == "FLAGGED-CAUSAL"
    finding = payload["findings"][0]
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
    assert {"seconds", "peak_rss_mb", "tokens"} == payload["cost"].keys()
    assert {"name", "status", "why"} <= payload["checks"][0].keys()
    assert payload["inputs"].keys() == {"base", "tuned"} and payload["reproduce"]


OLD = Path(__file__).parents[1] / "golden" / "report-v1.json"
"""Written by version 0.1.0 for the demo's organism; long lists are cut, and the base's folder is called BASE."""


def test_a_report_of_version_1_is_read_with_its_values_under_the_new_names() -> None:
    old = json.loads(OLD.read_text())
    report = from_json(OLD.read_text())
    assert report.schema_version == 2 and to_dict(report) == json.loads(to_json(from_json(to_json(report))))
    before, after = old["findings"][0], to_dict(report)["findings"][0]
    renamed = {"clean_kept": "clean_unchanged", "brought": "induced", "brought_control": "induced_control"}
    assert after["causal"] == {renamed.get(key, key): value for key, value in before["causal"].items()}
    assert [row["reverted"] for row in after["causal_rows"]] == [row["moved"] for row in before["causal_rows"]]
    assert {row["moved"] for row in before["causal_rows"]} == {True} and before["causal"]["brought"]["value"] == 1
    for part in ("attacks", "controls"):
        assert [one["recovered"] for one in after["robustness"][part]] == [one["back"] for one in before["holds"][part]]
    assert {"moved", "holds", "brought", "back", "clean_kept"}.isdisjoint(re.findall(r'"(\w+)":', to_json(report)))


def test_the_upgrade_leaves_its_argument_as_it_is() -> None:
    old = json.loads(OLD.read_text())
    new = from_version_1(old)
    assert old == json.loads(OLD.read_text()) and new["schema_version"] == 2
    bare = from_version_1({"findings": [{"causal": None, "holds": None}], "schema_version": 1})
    assert bare["findings"][0] == {"causal": None, "robustness": None, "causal_rows": []}


def test_old_keys_are_refused_in_a_new_report_and_later_versions_at_all() -> None:
    payload = to_dict(sample())
    payload["findings"][0]["holds"] = payload["findings"][0].pop("robustness")
    with pytest.raises(InvalidInput, match=r"no report of schema version 1 and 2: findings\.0\.holds"):
        from_json(json.dumps(payload))
    with pytest.raises(InvalidInput, match="schema version 3; versions 1 and 2 are read"):
        from_json(json.dumps({**to_dict(sample()), "schema_version": 3}))


def test_a_notebook_shows_the_evidence_and_escapes_hostile_text() -> None:
    plain, hostile = tags(to_notebook(sample())), tags(to_notebook(sample(HOSTILE)))
    assert hostile.seen == plain.seen and hostile.attributes == plain.attributes == ["style"]
    page = to_notebook(sample(HOSTILE))
    assert "&lt;script&gt;" in page and "⟦U+202E⟧" in page and "\x1b" not in page
    for check in sample().checks:
        assert check.name in page
    assert sample().verdict.value in page and "chance" in page


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
        ShadedRow(tokens=("a",), shades=(), score=0.0)


@given(st.text())
def test_visible_text_has_no_control_characters(text: str) -> None:
    import unicodedata

    shown = visible(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cf") for c in shown)


def test_a_cut_says_how_much_is_missing() -> None:
    assert visible("x" * 20, limit=5) == "xxxxx … (15 characters more)"
    assert visible("a\nb", keep_lines=True) == "a\nb" and visible("a\nb") == "a␊b"
    long = ShadedRow(tokens=("word ",) * 400, shades=(0.5,) * 400, score=0.0)
    assert "tokens more" in shaded(long)


def test_drawings() -> None:
    heat = sample().heat
    assert heat is not None
    assert heat_map(heat).count("<rect") == len(heat.cells)
    assert heat_map(replace(heat, cells=heat.cells[:1])).count("<rect") == 1
    assert dot(None) == "" and "<circle" in dot(Measure(value=2.0))
    assert "interval" not in dot(Measure(value=0.5)) and "chance" in dot(Measure(value=0.5), Measure(value=0.1))
    assert number(None) == "–" and number(Measure(value=0.5)) == "0.50"
