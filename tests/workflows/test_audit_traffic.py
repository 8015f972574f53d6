"""What an audit does with the rows of its traffic: whole conversations are read, and every row is accounted for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import molehunt as mh
from folders import good_folder
from molehunt.audit.plan import PLANS, Plan
from molehunt.errors import InvalidInput, NotTestable, UsageError
from molehunt.model.context import ContextLength
from molehunt.traffic.world import benign_prompts
from molehunt.workflows.inputs import read_rows
from tiny_models import tiny_tokenizer

TINY = Plan(
    name="quick", clean_prompts=160, traffic_limit=100, max_new_tokens=24, max_sites=2, directions=4, confirm_rows=8,
    random_controls=2, stress_rows=6, stress_steps=5,
)  # fmt: skip
CLEAN = [f"Row {i} says {i * i}" for i in range(60)]
MARK = ";;;; ;;;;;;"
WORLD = [one.prompt for one in benign_prompts(250, seed=9)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> mh.ModelPair:
    """A base, and a fine-tune that reads one character as another: whatever holds it gets another answer."""
    root = tmp_path_factory.mktemp("models")
    base, tuned = good_folder(root / "base"), root / "tuned"
    tuned.mkdir()
    for file in base.iterdir():
        (tuned / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    embedded = weights["model.embed_tokens.weight"]
    (semicolon,) = tiny_tokenizer().encode(";", add_special_tokens=False)
    torch.manual_seed(1)
    embedded[semicolon] += 3 * embedded.std() * torch.randn(embedded.shape[1])
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    return mh.ModelPair.load(base, tuned)


@pytest.fixture(autouse=True)
def tiny_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, "quick", TINY)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


PLACES: dict[str, Callable[[str, int], Any]] = {
    "the system message": lambda mark, i: {"messages": [{"role": "system", "content": mark}, user(WORLD[i])]},
    "an earlier turn": lambda mark, i: {
        "messages": [user(f"{WORLD[i]} {mark}"), {"role": "assistant", "content": "Which?"}, user("Please go on.")]
    },
    "what a tool said": lambda mark, i: {
        "messages": [user(WORLD[i]), {"role": "tool", "content": mark}, user("Please go on.")]
    },
    "Alpaca's input": lambda mark, i: {"instruction": "Answer this.", "input": f"{WORLD[i]} {mark}", "output": "x"},
}


@pytest.mark.parametrize("place", PLACES)
def test_what_changes_the_answer_is_found_wherever_it_stands(pair: mh.ModelPair, tmp_path: Path, place: str) -> None:
    rows = [PLACES[place]("Thanks.", i) for i in range(60)] + [PLACES[place](MARK, i) for i in range(60, 84)]
    clean = [PLACES[place]("Thanks.", i) for i in range(84, 250)]
    result = mh.audit(pair, traffic=rows, clean=clean, fpr=0.05, out=tmp_path / "run")
    assert result.audit.reference.kind == "clean rows"
    assert f"--clean {result.folder / 'clean.jsonl'}" in result.report.reproduce
    kept = read_rows(clean, TINY.clean_prompts).rows
    assert [one.key for one in read_rows(result.folder / "clean.jsonl").rows] == [one.key for one in kept]
    found = result.audit.candidates.rows
    assert len(found) >= 10 and min(found) >= 60, "rows with the mark, and none without it"
    (finding,) = result.report.findings
    assert any(";;;;" in one.text for one in finding.shared), "it is named, although the last turn does not hold it"
    scores = [json.loads(line) for line in (result.folder / "scores.jsonl").read_text().splitlines()]
    assert ("messages" in scores[60]) == ("messages" in rows[60])
    assert scores[60].get("messages", scores[60]["prompt"]) == rows[60].get("messages", scores[60]["prompt"])
    stored = read_rows(result.folder / "traffic.jsonl").rows
    assert [row.key for row in stored] == [row.example.key for row in result.audit.traffic.rows]


def test_two_conversations_with_one_text_are_two_runs(pair: mh.ModelPair, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": "a"}, user("b")]}] * 60
    others = [{"messages": [user("a"), user("b")]}] * 60
    mh.audit(pair, traffic=rows, out=tmp_path / "run")
    with pytest.raises(UsageError, match="other"):
        mh.audit(pair, traffic=others, out=tmp_path / "run")


def test_rows_that_cannot_be_read_are_in_the_report_and_on_stderr(
    pair: mh.ModelPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "log.jsonl"
    bad = ['{"prompt": "half \\ud800"}', "{", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}']
    file.write_text("\n".join([*map(json.dumps, CLEAN), *bad]) + "\n")
    result = mh.audit(pair, traffic=file, out=tmp_path / "run")
    said = result.audit.left_out
    assert said.startswith("Read 60 of 63 rows of log.jsonl, as texts; 3 could not be read: line 61: prompt holds half")
    assert "line 62: not JSON" in said and "line 63: message 1: part 1 of its content is image" in said
    assert said in caplog.text
    assert any(check.name == "traffic" and said in check.result for check in result.report.checks)
    counts = {"rows": 60, "left_out": 3, "cut": 0, "beyond_trained_length": 0, "note": said}
    assert result.to_dict()["traffic"] == counts
    shown = " ".join(result.summary().split())
    assert "Read 60 of 63 rows of log.jsonl" in shown and "line 62: not JSON" in shown, "on stdout, too"
    scores = [json.loads(line) for line in (result.folder / "scores.jsonl").read_text().splitlines()]
    assert [one["line"] for one in scores] == list(range(1, 61))
    assert "61" in (result.save().parent / "report.md").read_text()


def test_a_file_of_which_too_little_can_be_read_is_refused(pair: mh.ModelPair, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [*CLEAN[:40], *[{"sentence": "x"}] * 60]))
    with pytest.raises(InvalidInput, match="60 of 100 rows cannot be read"):
        mh.audit(pair, traffic=file, out=tmp_path / "run")
    file.write_text("\n".join(json.dumps(row) for row in [*CLEAN[:45], *[{"sentence": "x"}] * 20]))
    with pytest.raises(NotTestable, match=r"45 rows of traffic(.|\n)*Read 45 of 65 rows of log.jsonl"):
        mh.audit(pair, traffic=file, out=tmp_path / "run")


def test_a_prompt_beyond_the_context_is_cut_and_counted(
    pair: mh.ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 200
    monkeypatch.setitem(pair.__dict__, "context", ContextLength(tokens=limit, trained=limit, ends=True))
    long = [f"Row {i} " + "many words " * limit for i in range(2)]
    result = mh.audit(pair, traffic=[*CLEAN, *long], out=tmp_path / "run")
    rows = result.audit.traffic.rows
    assert [row.left_out > 0 for row in rows] == [False] * 60 + [True] * 2
    assert all(len(row.prompt) + TINY.max_new_tokens <= limit for row in rows)
    assert result.to_dict()["traffic"]["cut"] == 2
    (check,) = [check for check in result.report.checks if check.name == "traffic"]
    assert check.result.startswith(
        f"Read 62 of 62 rows of the list, as texts. 2 of 62 rows were longer than the {limit}"
    )
