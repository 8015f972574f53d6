"""The command behind all topics: its list, its records, and the layout of its pages."""

import json
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.catalog import CATALOG
from experiments.page import ENDS, SENTENCES, page, prose
from experiments.records import append_record, read_records
from experiments.setting import Setting
from molehunt.errors import InvalidInput, UsageError

ROOT = Path(__file__).parents[2]


def test_without_a_topic_every_topic_is_listed_with_its_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CATALOG)
    assert all(line.endswith("?") for line in lines)


def test_every_topic_has_its_files_and_no_other_folder_has_a_table() -> None:
    packages = {path.parent.name for path in (ROOT / "experiments").glob("*/table.py")}
    assert packages == {topic.package.removeprefix("experiments.") for topic in CATALOG.values()}
    assert all((ROOT / "experiments" / name / "measure.py").is_file() for name in packages)


def test_records_come_back_and_the_last_of_a_name_counts(tmp_path: Path) -> None:
    file = tmp_path / "topic.jsonl"
    for n in (1, 2):
        append_record(file, "a run", {"n": n})
    append_record(file, "another", {"n": 3})
    assert read_records(file) == {"a run": {"n": 2}, "another": {"n": 3}}
    assert read_records(tmp_path / "none.jsonl") == {}


def test_a_line_that_a_kill_cut_off_is_reported_and_spoils_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "topic.jsonl"
    append_record(file, "whole", {"n": 1})
    with file.open("a") as out:
        out.write('{"run": "cut", "fou')
    append_record(file, "after", {"n": 2})
    assert read_records(file) == {"whole": {"n": 1}, "after": {"n": 2}}
    assert ":2: this line was cut off" in capsys.readouterr().err


def test_a_line_that_is_no_record_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "topic.jsonl"
    file.write_text(json.dumps({"n": 1}) + "\n")
    with pytest.raises(InvalidInput, match=r":1 is no record"):
        read_records(file)


def test_a_page_without_a_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soak", "--table", "--out", str(tmp_path)]) == UsageError.exit_code
    assert "has no run of soak yet" in capsys.readouterr().err


def test_missing_texts_are_named(tmp_path: Path) -> None:
    setting = Setting(topic="stress", quick=False, out=tmp_path, bench=tmp_path)
    with pytest.raises(UsageError, match=r"stress needs some\.csv\.\nName the folder that holds it with --data FOLDER"):
        setting.need_data("some.csv")


def test_a_page_opens_with_exactly_three_sentences() -> None:
    with pytest.raises(UsageError, match="opens with 2 sentences"):
        page("A title", ["One.", "Two."], [], "How.")
    text = page("A title", ["One.", "Two.", "Three."], ["| a |", "|---|"], "How.")
    assert text == "# A title\n\nOne. Two. Three.\n\n| a |\n|---|\n\n## How it was measured\n\nHow.\n"


def test_prose_is_broken_outside_of_code_and_items_are_indented() -> None:
    lines = prose("- " + "word " * 30 + "`" + "code " * 10 + "end`")
    assert all(len(line) <= 118 for line in lines) and len(lines) > 1
    assert all(line.startswith("  ") for line in lines[1:])
    assert all(line.count("`") % 2 == 0 for line in lines)


def test_every_published_page_opens_with_three_sentences() -> None:
    for topic in CATALOG.values():
        file = ROOT / "docs" / "results" / topic.page
        if file.is_file():
            opening = " ".join(file.read_text().split("\n\n")[1].split())
            assert len(ENDS.split(opening)) == SENTENCES, file
