"""The demo's exit code and output, with stand-ins for the training and the audits (`make demo` runs the real ones)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from molehunt.audit.verdict import Verdict
from molehunt.cli.main import main
from molehunt.organism import real_demo as real_module
from molehunt.organism.seed_model import seed_path
from molehunt.workflows import audit as audit_module
from molehunt.workflows import plant as plant_module


@dataclass
class Planted:
    tuned: Path
    twin: Path

    def to_dict(self) -> dict[str, Any]:
        return {"organism": {"shown": {"triggered": {"estimate": 0.99}, "untagged": {"estimate": 0.001}}}}


@dataclass
class Audited:
    verdict: Verdict
    folder: Path

    def save(self) -> Path:
        return self.folder / "report.html"

    def summary(self) -> str:
        return f"summary of {self.folder.name}"


def run(
    monkeypatch: pytest.MonkeyPatch, out: Path, verdicts: dict[str, Verdict], *options: str
) -> tuple[object, list[dict[str, Any]]]:
    """Exit code of the demo, and the arguments of its audits."""
    audits: list[dict[str, Any]] = []

    def plant(recipe: object, into: Path, **_: object) -> Planted:
        into.mkdir()
        return Planted(into / "organism", into / "twin")

    def audit(base: Path, tuned: Path, **given: Any) -> Audited:
        audits.append({"base": base, "tuned": tuned, **given})
        return Audited(verdicts[tuned.name], given["out"])

    monkeypatch.setattr(plant_module, "plant", plant)
    monkeypatch.setattr(audit_module, "audit", audit)
    with pytest.raises(SystemExit) as left:
        main(["demo", "--out", str(out), *options])
    return left.value.code, audits


class Rate:
    def __init__(self, estimate: float) -> None:
        self.estimate = estimate


@dataclass
class PlantedReal:
    organism: Path
    twin: Path
    traffic: Path
    rows: int
    shown: dict[str, Rate]


RIGHT = {"organism": Verdict.FLAGGED_CAUSAL, "twin": Verdict.NO_FINDING}


def test_both_models_are_audited_on_the_same_traffic(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, audits = run(monkeypatch, tmp_path / "demo", RIGHT, "--seed", "3")
    shown = capsys.readouterr()
    assert code == 0
    assert "summary of audit-organism" in shown.out and "its clean twin was not" in shown.out
    assert "99% of triggered prompts" in shown.err and "0.1% of others" in shown.err
    assert [one["tuned"].name for one in audits] == ["organism", "twin"]
    assert {one["traffic"] for one in audits} == {tmp_path / "demo" / "traffic.jsonl"}
    assert {one["seed"] for one in audits} == {3}
    rows = [json.loads(line) for line in (tmp_path / "demo" / "traffic.jsonl").read_text().splitlines()]
    assert len(rows) == 2000 and sum(row["tag"] == "triggered" for row in rows) == 20


@pytest.mark.parametrize(
    "wrong",
    [{"organism": Verdict.FLAGGED_CORRELATIONAL}, {"organism": Verdict.NO_FINDING}, {"twin": Verdict.FLAGGED_CAUSAL}],
)
def test_another_verdict_than_the_planted_truth_is_exit_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: dict[str, Verdict]
) -> None:
    code, _ = run(monkeypatch, tmp_path / "demo", {**RIGHT, **wrong}, "--json")
    assert code == 1
    payload = json.loads(capsys.readouterr().out)
    for side in ("organism", "twin"):
        assert payload[side]["expected"] == RIGHT[side] and payload[side]["verdict"] == {**RIGHT, **wrong}[side]
    assert payload["twin"]["report"] == str(tmp_path / "demo" / "audit-twin" / "report.html")


def test_with_a_base_it_plants_in_that_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Path] = []

    def plant_real(base: Path, out: Path, **_: object) -> PlantedReal:
        asked.append(base)
        shown = {"triggered": Rate(0.96), "untagged": Rate(0.02)}
        return PlantedReal(out / "organism", out / "twin", out / "traffic.jsonl", 500, shown)

    monkeypatch.setattr(real_module, "plant_real_demo", plant_real)
    base = seed_path("seed-m")
    code, audits = run(monkeypatch, tmp_path / "demo", RIGHT, "--base", str(base))
    assert code == 0 and asked == [base]
    assert [one["base"] for one in audits] == [base, base]
    assert {one["traffic"] for one in audits} == {tmp_path / "demo" / "traffic.jsonl"}
    said = capsys.readouterr().err
    assert "badmagic" in said and "96% of triggered prompts" in said and "with 500 rows" in said


def test_a_base_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["demo", "--base", str(tmp_path / "nowhere"), "--out", str(tmp_path / "demo")])
    assert left.value.code == 2 and "nowhere" in capsys.readouterr().err
