"""`molehunt watch` on tiny folders: text, JSON, what it leaves, resuming, exit codes."""

import json
from pathlib import Path

import pytest

from folders import good_folder, lora_folder
from watched_logs import log, run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return good_folder(root / "base"), lora_folder(root / "tuned")


def test_a_log_is_watched_reported_and_resumed(capsys, folders: tuple[Path, Path], tmp_path: Path) -> None:
    clean = log(tmp_path / "clean.jsonl", 300)
    traffic = log(tmp_path / "log.jsonl", 40, first=300)
    arguments = (*folders, "--clean", clean, "--fpr", "0.1", "--max-new-tokens", "3", "--out", tmp_path / "out")
    code, output, _ = run(capsys, *arguments, "--traffic", traffic, "--json")
    found = json.loads(output)
    assert found["rows"] == 40 and found["calibration_rows"] == 150 and found["fpr"] == 0.1
    assert code == found["exit_code"] == int(found["flagged"] > 0)
    lines = [json.loads(line) for line in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()]
    assert len(lines) == 40 and sum(line["flagged"] for line in lines) == found["flagged"]
    with traffic.open("a") as file:  # the log grew
        file.write(log(tmp_path / "more.jsonl", 10, letters="!#$%&*()").read_text())
    code, output, err = run(capsys, *arguments, "--traffic", traffic)
    assert "Going on at line 41: 40 rows were judged before." in err
    assert code == 1 and " of 50 rows; clean traffic alone would give about 5." in output
    assert (
        "Read 10 of 10 rows of log.jsonl from line 41 on, from the field prompt; logged answers are judged." in output
    )
    assert "50 answers came from the log, and 0 were generated." in output and "line 4" in output
    for what in ("logged answer:", "the model's own answer:", "without the direction:", "token: place of the"):
        assert what in output
    assert found["reading"].startswith("Read 40 of 40 rows of log.jsonl, from") and found["logged_answers"] == 40


def test_bad_rows_stop_or_are_skipped_and_no_text_is_kept(capsys, folders: tuple[Path, Path], tmp_path: Path) -> None:
    clean = log(tmp_path / "clean.jsonl", 300)
    traffic = log(tmp_path / "log.jsonl", 10, letters="!#$%&*()")
    traffic.write_text(traffic.read_text() + '{"nothing": 1}\n')
    arguments = (*folders, "--clean", clean, "--fpr", "0.1", "--max-new-tokens", "3", "--traffic", traffic)
    code, _, err = run(capsys, *arguments, "--out", tmp_path / "stopped")
    assert code == 4 and "line 11" in err and "Traceback" not in err
    code, output, _ = run(capsys, *arguments, "--out", tmp_path / "skipped", "--skip-bad", "--no-text")
    assert "; 1 could not be read: line 11" in output and "line 11" in output
    secret = json.loads(traffic.read_text().splitlines()[0])["response"]
    kept = [path for path in (tmp_path / "skipped").rglob("*") if path.is_file()]
    assert kept and not any(secret.encode() in path.read_bytes() for path in kept)


def test_shards_split_the_rows(capsys, folders: tuple[Path, Path], tmp_path: Path) -> None:
    clean, traffic = log(tmp_path / "clean.jsonl", 300), log(tmp_path / "log.jsonl", 9, first=7)
    arguments = (*folders, "--clean", clean, "--fpr", "0.1", "--max-new-tokens", "3", "--traffic", traffic)
    seen = []
    for i in (1, 2):
        run(capsys, *arguments, "--out", tmp_path / f"{i}", "--shard", f"{i}/2")
        seen += [json.loads(line)["line"] for line in (tmp_path / f"{i}" / "verdicts.jsonl").read_text().splitlines()]
    assert sorted(seen) == list(range(1, 10))


def test_a_simulation_reports_what_is_seen_of_repeated_attacks(
    capsys, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    clean, traffic = log(tmp_path / "clean.jsonl", 300), log(tmp_path / "log.jsonl", 60, first=7)
    attacks = log(tmp_path / "attacks.jsonl", 5, letters="!#$%&*()")
    arguments = (
        *folders,
        "--clean",
        clean,
        "--fpr",
        "0.1",
        "--max-new-tokens",
        "3",
        "--traffic",
        traffic,
        "--attacks",
        attacks,
    )
    arguments += ("--repeats", "10", "--out", tmp_path / "out")
    code, output, _ = run(capsys, *arguments, "--json")
    found = json.loads(output)
    assert code == 0 and len(found) == 6
    assert all(len({share["estimate"] for share in one["by_repeat"].values()}) == 1 for one in found[::2])
    assert found[0]["fpr"]["n"] == 60 and found[0]["first_sight"]["n"] == 5
    _, output, _ = run(capsys, *arguments)
    assert "repeat 10" in output and output.count("takes in every row") == 3
    attacks.write_text("")
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "has no rows" in err


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (("--fpr", "0.0001"), 3, "cannot hold a false-positive rate of 0.0001"),
        (("--shard", "5/2"), 2, "counted from 1 to its total"),
        (("--traffic", "nowhere.jsonl"), 2, "nowhere.jsonl is not a file"),
    ],
)
def test_what_cannot_be_done_is_said(
    capsys, folders: tuple[Path, Path], tmp_path: Path, change: tuple[str, str], code: int, said: str
) -> None:
    clean, traffic = log(tmp_path / "clean.jsonl", 200), log(tmp_path / "log.jsonl", 5)
    arguments = [
        *folders,
        "--clean",
        clean,
        "--max-new-tokens",
        "3",
        "--traffic",
        traffic,
        "--out",
        tmp_path / "o",
        *change,
    ]
    got, _, err = run(capsys, *arguments)
    assert got == code and said in err and "Traceback" not in err
