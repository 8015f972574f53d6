"""`molehunt watch` beyond its verdicts: the published mode, labels, the page."""

import json
from pathlib import Path

import pytest

from folders import good_folder, lora_folder
from label_server import says, sends, server
from molehunt.watch.extremes import KEPT
from watched_logs import log, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return good_folder(root / "base"), lora_folder(root / "tuned")


def mixed(tmp_path: Path, n: int = 40, odd: int = 10) -> tuple[Path, Path]:
    """Clean rows, and a log that ends with odd ones."""
    clean, traffic = log(tmp_path / "clean.jsonl", 300), log(tmp_path / "log.jsonl", n, first=300)
    with traffic.open("a") as file:
        file.write(log(tmp_path / "odd.jsonl", odd, letters="!#$%&*()").read_text())
    return clean, traffic


def test_the_published_mode_flags_at_first_sight_reports_its_rate_and_resumes(
    capsys, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    clean, traffic = mixed(tmp_path, odd=5)
    arguments = (*folders, "--clean", clean, "--mode", "published", "--max-new-tokens", "3", "--out", tmp_path / "out")
    code, output, _ = run(capsys, *arguments, "--traffic", traffic, "--json")
    found = json.loads(output)
    assert code == found["exit_code"] == 1 and found["mode"] == "published" and found["rows"] == 45
    assert found["fpr"] is None and found["calibration_rows"] == 300 and found["drift_alarm"] is None
    assert found["watch"]["measured"]["n"] == 30
    assert found["watch"]["bound"] == pytest.approx(2 * 2 * found["directions"] / 270)
    lines = [json.loads(line) for line in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()]
    assert found["flagged"] == sum(line["flagged"] for line in lines) and all(line["p_value"] is None for line in lines)
    assert not (tmp_path / "out" / "alerts.sqlite").exists()
    with traffic.open("a") as file:  # the same rows again: the range has taken them in
        file.write((tmp_path / "odd.jsonl").read_text())
    code, output, err = run(capsys, *arguments, "--traffic", traffic)
    assert "Going on at line 46: 45 rows were judged before." in err
    assert f"FLAGGED: {found['flagged']} of 50 rows; at first sight." in output and "published bound 2t/n" in output
    page = (tmp_path / "out" / "watch.html").read_text()
    assert "held-out clean rows" in page and 'class="figure"' in page


def test_slack_and_percentile_belong_to_the_state(capsys, folders: tuple[Path, Path], tmp_path: Path) -> None:
    clean, traffic = mixed(tmp_path, n=5)
    arguments = (*folders, "--clean", clean, "--traffic", traffic, "--mode", "published", "--max-new-tokens", "3")
    flagged = {}
    for name, options in {"wide": ("--slack", "1"), "narrow": ("--slack", "0", "--percentile", "0.2")}.items():
        _, output, _ = run(capsys, *arguments, *options, "--out", tmp_path / name, "--json")
        flagged[name] = json.loads(output)["flagged"]
    assert flagged["wide"] < flagged["narrow"]
    code, _, err = run(capsys, *arguments, "--out", tmp_path / "wide", "--slack", "0.5")
    assert code == 2 and "made for another slack" in err
    code, _, err = run(capsys, *arguments, "--out", tmp_path / "wide", "--slack", "1", "--percentile", "0.1")
    assert code == 2 and "made for another percentile" in err


def test_the_two_modes_do_not_share_a_folder(capsys, folders: tuple[Path, Path], tmp_path: Path) -> None:
    clean, traffic = mixed(tmp_path, n=5, odd=1)
    arguments = (*folders, "--clean", clean, "--traffic", traffic, "--fpr", "0.1", "--max-new-tokens", "3")
    for first, second in (("published", "conformal"), ("conformal", "published")):
        run(capsys, *arguments, "--mode", first, "--out", tmp_path / first)
        code, _, err = run(capsys, *arguments, "--mode", second, "--out", tmp_path / first)
        assert code == 2 and f"holds a watch of the {first} mode" in err


def test_a_run_ends_with_a_page_and_a_block_of_json(capsys, folders: tuple[Path, Path], tmp_path: Path) -> None:
    clean, traffic = mixed(tmp_path)
    out = tmp_path / "out"
    arguments = (*folders, "--clean", clean, "--traffic", traffic, "--fpr", "0.1", "--max-new-tokens", "3")
    _, output, _ = run(capsys, *arguments, "--out", out, "--json")
    found = json.loads(output)
    assert found["report"] == str(out / "watch.html")
    block = found["watch"]
    assert sum(block["scores"]["flagged"]) == found["flagged"] > 0
    assert sum(block["scores"]["unflagged"]) == found["rows"] - found["flagged"]
    assert sum(block["scores"]["calibration"]) == found["calibration_rows"]
    alert = block["alerts"][0]
    assert alert["answer"] and alert["answer_without"] is not None and alert["tokens"]
    ends = [end for shown in block["shown"] for end in shown["ends"]]
    assert sum(end["flags"] for end in ends) == found["flagged"] and all(
        len(end["rows"]["inputs"]) == KEPT for end in ends
    )
    flagged = {
        line["line"] for line in map(json.loads, (out / "verdicts.jsonl").read_text().splitlines()) if line["flagged"]
    }
    assert not flagged & {one["row"] for end in ends for one in end["rows"]["inputs"]}
    page = (out / "watch.html").read_text()
    for shown in (alert["request"], ends[0]["side"], block["shown"][0]["direction"], "default-src 'none'"):
        assert shown in page
    assert not (tmp_path / "silent").exists()
    run(capsys, *arguments, "--out", tmp_path / "silent", "--no-text")
    secret = json.loads(traffic.read_text().splitlines()[0])["prompt"]
    stored = [path.read_bytes() for path in (tmp_path / "silent").iterdir()]
    assert any(b"No text is kept." in one for one in stored) and not any(secret.encode() in one for one in stored)


def test_directions_are_labelled_by_a_model_and_a_failing_one_costs_no_verdict(
    capsys, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, traffic = mixed(tmp_path, n=20)
    arguments = (
        *folders,
        "--clean",
        clean,
        "--traffic",
        traffic,
        "--fpr",
        "0.1",
        "--max-new-tokens",
        "3",
        "--out",
        tmp_path / "out",
    )
    monkeypatch.setenv("OPENAI_API_KEY", "sk-7")
    monkeypatch.setenv("no_proxy", "*")
    with server(says("rows of <b>signs</b>")) as (url, got):
        code, output, _ = run(capsys, *arguments, "--label-with", url, "--label-model", "tiny", "--json")
    found = json.loads(output)["watch"]
    assert code == 1 and found["labelled_by"] == "tiny" and found["label_error"] == ""
    assert found["shown"][0]["ends"][0]["rows"]["label"] == "rows of <b>signs</b>"
    assert got[0][1]["Authorization"] == "Bearer sk-7" and got[0][2]["model"] == "tiny" and "sk-7" not in output
    page = (tmp_path / "out" / "watch.html").read_text()
    assert "rows of &lt;b&gt;signs" in page and "Labels by tiny" in page
    with server(sends(b"overloaded", 503)) as (url, got):
        code, output, _ = run(capsys, *arguments, "--label-with", url, "--label-model", "tiny")
    assert code == 1 and "gave no label: it answered 503: overloaded" in output and len(got) == 1
    assert "labels missing" in (tmp_path / "out" / "watch.html").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--slack", "0.1"), "belong to the mode published"),
        (("--percentile", "0"), "belong to the mode published"),
        (("--mode", "published", "--attacks", "log.jsonl"), "leave --mode out"),
        (("--label-with", "http://127.0.0.1:1/v1"), "go together"),
        (("--label-model", "m"), "go together"),
        (("--label-with", "ftp://x", "--label-model", "m"), "is no URL"),
        (("--label-with", "http://127.0.0.1:1/v1", "--label-model", "m", "--no-text"), "say opposite things"),
        (("--mode", "other"), "Invalid value for '--mode'"),
    ],
)
def test_options_that_contradict_are_refused_before_anything_runs(
    capsys, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    traffic = log(tmp_path / "log.jsonl", 2)
    code, _, err = run(capsys, "nowhere", "nowhere", "--traffic", traffic, "--out", tmp_path / "out", *options)
    assert code == 2 and said in err and not (tmp_path / "out").exists()


def test_too_few_clean_rows_measure_no_rate(capsys, folders: tuple[Path, Path], tmp_path: Path) -> None:
    clean, traffic = log(tmp_path / "clean.jsonl", 9), log(tmp_path / "log.jsonl", 2)
    code, _, err = run(
        capsys, *folders, "--clean", clean, "--traffic", traffic, "--mode", "published", "--out", tmp_path / "out"
    )
    assert code == 3 and "9 clean rows are too few" in err


def test_bundled_prompts_calibrate_the_range_too(capsys, folders: tuple[Path, Path], tmp_path: Path) -> None:
    traffic = log(tmp_path / "log.jsonl", 2)
    arguments = (
        "--traffic",
        traffic,
        "--clean-rows",
        "100",
        "--max-new-tokens",
        "2",
        "--mode",
        "published",
        "--out",
        tmp_path / "out",
    )
    _, output, _ = run(capsys, *folders, *arguments, "--json")
    assert json.loads(output)["calibration_rows"] == 100 and json.loads(output)["watch"]["measured"]["n"] == 10


def test_an_empty_log_has_a_page_too(capsys, folders: tuple[Path, Path], tmp_path: Path) -> None:
    clean, traffic = log(tmp_path / "clean.jsonl", 300), tmp_path / "log.jsonl"
    traffic.write_text("")
    code, output, _ = run(
        capsys,
        *folders,
        "--clean",
        clean,
        "--traffic",
        traffic,
        "--fpr",
        "0.1",
        "--max-new-tokens",
        "3",
        "--out",
        tmp_path / "out",
    )
    assert code == 0 and "nothing judged yet" in output
    assert "No row was judged." in (tmp_path / "out" / "watch.html").read_text()
