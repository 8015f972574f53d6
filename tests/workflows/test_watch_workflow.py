"""`mh.watch` in a notebook: the same verdicts as the command's, in memory, and one answer at a time."""

import json
import shutil
from pathlib import Path

import pytest

import molehunt as mh
from folders import good_folder, lora_folder
from molehunt.errors import InvalidInput, NotTestable, UsageError
from molehunt.model.roles import roled_prompt
from molehunt.traffic.turn import Turn
from molehunt.watch.ledger import Ledger
from molehunt.workflows.result import WorkflowResult
from molehunt.workflows.watch import AnswerVerdict, WatchResult
from molehunt.workflows.watch_options import Mode
from watched_logs import log, run

FPR = 0.1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return good_folder(root / "base"), lora_folder(root / "tuned")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Clean rows, and a log that ends with odd ones."""
    root = tmp_path_factory.mktemp("rows")
    clean, traffic = log(root / "clean.jsonl", 300), log(root / "log.jsonl", 25, first=300)
    with traffic.open("a") as file:
        file.write(log(root / "odd.jsonl", 6, letters="!#$%&*()").read_text())
    return clean, traffic


def listed(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def watcher(folders: tuple[Path, Path], files: tuple[Path, Path]) -> WatchResult:
    pair = mh.ModelPair.load(*folders)
    return mh.watch(pair, clean=listed(files[0]), fpr=FPR, max_new_tokens=3)


@pytest.fixture(scope="module")
def watched(watcher: WatchResult, files: tuple[Path, Path]) -> WatchResult:
    return watcher.watch(listed(files[1]))


def test_a_calibrated_watch_has_judged_nothing(watcher: WatchResult) -> None:
    assert isinstance(watcher, WorkflowResult)
    assert watcher.verdicts == () and watcher.report.rows == 0 and watcher.report.calibration_rows == 150
    first = f"Calibrated on 150 clean rows: threshold {watcher.threshold:.4g}, nothing judged yet."
    assert watcher.summary().startswith(first) and "NO FINDING" not in watcher.summary()
    assert repr(watcher) == f"WatchResult({first})"


def test_one_answer_is_judged_as_its_row_in_the_log(
    watcher: WatchResult, watched: WatchResult, files: tuple[Path, Path]
) -> None:
    rows, verdicts = listed(files[1]), watched.verdicts
    assert len(verdicts) == 31 and {verdict.flagged for verdict in verdicts} == {True, False}
    for row, verdict in zip(rows, verdicts, strict=True):
        found = watcher.score(row["prompt"], row["response"])
        assert isinstance(found, AnswerVerdict) and found.answer == row["response"]
        assert found.flagged == (found.score > found.threshold) or found.score == round(found.threshold, 4)
        alone = {**found.to_dict(), "line": verdict.line}
        del alone["threshold"], alone["answer"]
        assert alone == verdict.to_dict()
    assert watcher.report.rows == 0 and watcher.watched.state.seen == 0  # nothing was recorded


def test_an_answer_that_is_not_given_is_generated(watcher: WatchResult) -> None:
    found = watcher.score([{"role": "user", "content": "abc"}])
    assert found.tokens >= 1 and found.answer == watcher.score("abc").answer
    with pytest.raises(InvalidInput):
        watcher.score([])


@pytest.mark.parametrize("mode", ["conformal", "published"])
def test_an_empty_answer_is_judged_as_empty(
    watcher: WatchResult, folders: tuple[Path, Path], files: tuple[Path, Path], mode: Mode
) -> None:
    if mode == "published":
        watcher = mh.watch(*folders, clean=files[0], mode=mode, max_new_tokens=3)
    empty, generated = watcher.score("abc", ""), watcher.score("abc")
    prompt = len(roled_prompt(watcher.watched.target.pair.tokenizer, (Turn("user", "abc"),)).ids)
    assert empty.answer == "" and empty.tokens == prompt < generated.tokens
    assert generated.answer


def test_a_fine_tune_of_q_and_v_alone_is_named_as_such(
    folders: tuple[Path, Path], files: tuple[Path, Path], tmp_path: Path
) -> None:
    tuned = lora_folder(tmp_path / "tuned", target_modules=["q_proj", "v_proj"])
    with pytest.raises(NotTestable, match=r"changed only q and v; .*\n.*`molehunt audit`") as raised:
        mh.watch(folders[0], tuned, clean=files[0], fpr=FPR)
    assert "bit" not in str(raised.value)


def test_a_rate_that_cannot_be_held_is_refused_before_models_are_loaded(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> mh.ModelPair:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(mh.ModelPair, "load", load)
    rows = [f"row {i}" for i in range(150)]
    with pytest.raises(NotTestable, match=r"75 of them set the threshold, .* at least 99.*\n.*at least 197 clean rows"):
        mh.watch(*folders, clean=rows)
    with pytest.raises(NotTestable, match=r"at least 19997 clean rows, .*\. At most 2000 are read: raise clean_rows"):
        mh.watch(*folders, fpr=1e-4)
    with pytest.raises(NotTestable, match=r"100 clean rows are too few: half of them .*\n.*at least 120 clean rows"):
        mh.watch(*folders, clean=rows[:100], fpr=FPR)
    with pytest.raises(UsageError, match=r"above 0 and at most 0\.2, got 5"):
        mh.watch(*folders, clean=rows, fpr=5.0)


def test_lists_in_memory_give_the_verdicts_of_the_command(
    capsys: pytest.CaptureFixture[str],
    folders: tuple[Path, Path],
    files: tuple[Path, Path],
    watched: WatchResult,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    asked = ("--clean", files[0], "--traffic", files[1], "--fpr", FPR, "--max-new-tokens", 3, "--out", out, "--json")
    code, text, _ = run(capsys, *folders, *asked)
    assert code == 1
    lines = (out / "verdicts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [verdict.to_dict() for verdict in watched.verdicts]
    page = watched.save(tmp_path / "saved")
    assert (page.name, page.parent) == ("watch.html", tmp_path / "saved")
    assert (tmp_path / "saved" / "verdicts.jsonl").read_bytes() == (out / "verdicts.jsonl").read_bytes()
    told = json.loads(text)
    mine = watched.to_dict()
    for name in ("rows", "flagged", "share_flagged", "calibration_rows", "directions", "drift_alarm"):
        assert mine[name] == told[name], name
    for name in ("scores", "shown", "drift", "suspects", "threshold", "end_words"):
        assert json.loads(json.dumps(mine["watch"][name])) == told["watch"][name], name
    assert [one["request"] for one in mine["watch"]["alerts"]] == [one["request"] for one in told["watch"]["alerts"]]
    with Ledger(f"sqlite:///{tmp_path / 'saved' / 'alerts.sqlite'}") as ledger:
        assert len(ledger.recent(99)) == watched.report.flagged
    assert "verdicts, flagged rows" not in watched.summary() and "default-src 'none'" in page.read_text()


def test_a_watch_in_memory_goes_on_and_leaves_its_beginning_as_it_was(
    watcher: WatchResult, watched: WatchResult, files: tuple[Path, Path]
) -> None:
    rows = listed(files[1])
    first = watcher.watch(rows[:10])
    both = first.watch(rows[10:])
    assert [verdict.line for verdict in both.verdicts] == list(range(11, 32))
    assert both.report.rows == 31 and both.report.flagged == watched.report.flagged
    assert both.watched.state.drift.to_dict() == watched.watched.state.drift.to_dict()
    assert watcher.watch(rows).verdicts == watched.verdicts and first.report.rows == 10


def test_what_was_saved_from_memory_is_a_folder_that_the_command_goes_on_with(
    capsys: pytest.CaptureFixture[str], folders: tuple[Path, Path], files: tuple[Path, Path], tmp_path: Path
) -> None:
    clean, traffic = files[0], tmp_path / "log.jsonl"
    shutil.copy(files[1], traffic)
    result = mh.watch(*folders, traffic=traffic, clean=clean, fpr=FPR, max_new_tokens=3)
    result.save(tmp_path / "out")
    with traffic.open("a") as file:
        file.write('{"prompt": "abc", "response": "cba"}\n')
    asked = ("--clean", clean, "--traffic", traffic, "--fpr", FPR, "--max-new-tokens", 3, "--out", tmp_path / "out")
    _, _, err = run(capsys, *folders, *asked)
    assert "Going on at line 32: 31 rows were judged before." in err
    assert len((tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()) == 32


def test_a_list_resumes_in_its_folder_and_another_log_is_refused(
    watcher: WatchResult, files: tuple[Path, Path], tmp_path: Path
) -> None:
    pair, rows = watcher.watched.target.pair, listed(files[1])
    options = {"clean": listed(files[0]), "fpr": FPR, "max_new_tokens": 3, "out": tmp_path / "out"}
    first = mh.watch(pair, traffic=rows[:5], **options)
    assert first.report.rows == 5 and (tmp_path / "out" / "watch.html").exists()
    again = mh.watch(pair, traffic=[*rows[:5], "not seen before"], **options)
    assert [verdict.line for verdict in again.verdicts] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UsageError, match="another file than the one"):
        mh.watch(pair, traffic=files[1], **options)
    copied = again.save(tmp_path / "copy")
    assert (copied.parent / "verdicts.jsonl").read_bytes() == (tmp_path / "out" / "verdicts.jsonl").read_bytes()
    mh.watch(pair, traffic=files[1], **{**options, "out": tmp_path / "file"})
    with pytest.raises(UsageError, match="holds a watch of a file"):
        mh.watch(pair, traffic=rows, **{**options, "out": tmp_path / "file"})


def test_the_published_mode_scores_without_taking_in(
    folders: tuple[Path, Path], files: tuple[Path, Path], tmp_path: Path
) -> None:
    watcher = mh.watch(*folders, clean=files[0], mode="published", max_new_tokens=3)
    rows = listed(files[1])
    one = watcher.score(rows[-1]["prompt"], rows[-1]["response"])
    assert one.p_value is None and one.threshold == 0 and one.flagged == (one.score > 0)
    result = watcher.watch(rows[-1:])
    assert result.verdicts[0].score == one.score and result.report.mode == "published"
    taken_in = result.score(rows[-1]["prompt"], rows[-1]["response"])
    assert not taken_in.flagged and watcher.score(rows[-1]["prompt"], rows[-1]["response"]) == one
    assert result.save(tmp_path).exists() and not (tmp_path / "alerts.sqlite").exists()


def test_bad_rows_of_a_list_stop_or_are_skipped(watcher: WatchResult, files: tuple[Path, Path]) -> None:
    pair, rows = watcher.watched.target.pair, ["abc", {"nothing": 1}, "abd"]
    options = {"clean": listed(files[0]), "fpr": FPR, "max_new_tokens": 3}
    with pytest.raises(InvalidInput, match="row 2"):
        mh.watch(pair, traffic=rows, **options)
    found = mh.watch(pair, traffic=rows, skip_bad=True, **options)
    assert [verdict.line for verdict in found.verdicts] == [1, 3] and found.report.skipped == 1
    assert "Read 2 of 3 rows of the list" in found.summary() and "1 could not be read: row 2" in found.summary()


def test_a_notebook_shows_an_escaped_summary(watcher: WatchResult) -> None:
    found = watcher.watch(["<script>alert(1)</script>"])
    assert found._repr_html_().startswith("<pre") and "<script>" not in found._repr_html_()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"slack": 0.1}, UsageError, "belong to the mode published"),
        ({"mode": "published", "trust_clean": True}, UsageError, "takes every row in"),
        ({"traffic": "nowhere.jsonl"}, UsageError, "nowhere.jsonl is not a file; traffic takes"),
        ({"shard": "5/2"}, UsageError, "counted from 1"),
        ({"fpr": 0.0001}, NotTestable, r"false-positive rate of 0\.0001"),
        ({"tuned": "second"}, UsageError, "a loaded pair holds both models"),
    ],
)
def test_what_cannot_be_done_is_said(
    watcher: WatchResult, files: tuple[Path, Path], options: dict, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        mh.watch(watcher.watched.target.pair, **{"clean": files[0], "max_new_tokens": 3, **options})
