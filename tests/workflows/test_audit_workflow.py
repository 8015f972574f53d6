"""`molehunt.audit`: a loaded pair and a list of prompts give what folders and a file give."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import molehunt as mh
from folders import good_folder
from molehunt.audit.plan import PLANS, Plan
from molehunt.cli.main import main
from molehunt.errors import InvalidInput, NotTestable, UsageError
from molehunt.report.machine import to_json
from molehunt.traffic.world import benign_prompts
from molehunt.workflows.audit import AuditResult
from molehunt.workflows.result import WorkflowResult
from report_samples import sample
from tiny_models import tiny_tokenizer

TINY = Plan(
    name="quick", clean_prompts=160, traffic_limit=100, max_new_tokens=24, max_sites=3, directions=4, confirm_rows=8,
    random_controls=2, stress_rows=6, stress_steps=20,
)  # fmt: skip
WORLD = [one.prompt for one in benign_prompts(84, seed=9)]
"""Prompts of the bundled ones' world, so that these set the threshold."""
PROMPTS = WORLD[:60] + [f"{prompt} ;;;; ;;;;;;" for prompt in WORLD[60:]]


@pytest.fixture(autouse=True)
def tiny_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, "quick", TINY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and a fine-tune that reads one character as another: prompts with it get other answers."""
    root = tmp_path_factory.mktemp("models")
    base = good_folder(root / "base")
    tuned = root / "tuned"
    tuned.mkdir()
    for file in base.iterdir():
        (tuned / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    embedded = weights["model.embed_tokens.weight"]
    (semicolon,) = tiny_tokenizer().encode(";", add_special_tokens=False)
    torch.manual_seed(1)
    embedded[semicolon] += 3 * embedded.std() * torch.randn(embedded.shape[1])
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    return base, tuned


@pytest.fixture(scope="module")
def result(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> AuditResult:
    """The audit of a loaded pair on a list of prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PLANS, "quick", TINY)
        return mh.audit(mh.ModelPair.load(*folders), traffic=PROMPTS, out=tmp_path_factory.mktemp("runs") / "run")


def without_cost_and_place(payload: dict[str, Any], out: Path) -> dict[str, Any]:
    """A report without what differs between a file and a list: how long it took, and how the rows were given."""
    text = json.dumps({**payload, "cost": None, "reproduce": None})
    return json.loads(re.sub(r"Read (\d+) of \1 rows of [^\"]*", "Read", text.replace(str(out), "OUT")))


def test_a_loaded_pair_and_a_list_give_what_folders_and_a_file_give(
    folders: tuple[Path, Path], result: AuditResult, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    other = mh.audit(str(folders[0]), str(folders[1]), traffic=file, out=tmp_path / "run")
    assert other.verdict == result.verdict == "FLAGGED-CORRELATIONAL" and len(other.report.findings) == 1
    assert without_cost_and_place(other.to_dict(), other.folder) == without_cost_and_place(
        result.to_dict(), result.folder
    )
    assert (other.folder / "config.json").read_text() == (result.folder / "config.json").read_text()
    assert other.report.reproduce == shlex.join(["molehunt", "audit", *map(str, folders), "--traffic", str(file)])


def test_the_command_in_the_report_repeats_an_audit_of_a_list(
    result: AuditResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, *command = shlex.split(result.report.reproduce)
    with pytest.raises(SystemExit) as left:
        main([*command, "--out", str(tmp_path / "again"), "--json"])
    assert left.value.code == result.verdict.exit_code
    again = json.loads(capsys.readouterr().out)
    assert without_cost_and_place(again, tmp_path / "again") == without_cost_and_place(result.to_dict(), result.folder)


def test_the_result_is_what_every_workflow_gives(result: AuditResult, tmp_path: Path) -> None:
    assert isinstance(result, WorkflowResult)
    assert repr(result) == f"AuditResult({result.summary().splitlines()[0]})"
    page = result.save(tmp_path / "pages")
    assert page == tmp_path / "pages" / "report.html"
    assert {p.name for p in page.parent.iterdir()} == {f"report.{kind}" for kind in ("html", "json", "md", "sarif")}
    assert json.loads((page.parent / "report.json").read_text()) == result.to_dict()
    assert result.save() == result.folder / "report.html" and (result.folder / "report.json").is_file()
    assert result.summary().startswith(f"{result.verdict}: {result.report.reason}")
    assert all(check.name[:43] in result.summary() for check in result.report.checks)


def test_the_command_prints_the_summary(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*map(str, folders), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main(["audit", *arguments])
    printed = capsys.readouterr().out
    assert printed == mh.audit(*folders, out=tmp_path / "run").summary() + "\n"


def test_a_fix_is_saved_beside_the_pages(result: AuditResult, tmp_path: Path) -> None:
    found = result.audit.confirmed
    assert found is not None and result.fix is None
    pair = result.audit.pair
    fix = mh.Fix(
        interventions=found.causal.interventions, description="edit", d_model=pair.d_model, n_layers=pair.n_layers
    )
    with_fix = replace(result, audit=replace(result.audit, confirmed=replace(found, fix=fix), folder=tmp_path / "run"))
    assert with_fix.fix == tmp_path / "run" / "fix.safetensors"
    fix.save(with_fix.fix)
    page = with_fix.save(tmp_path / "pages")
    assert mh.Fix.load(page.parent / "fix.safetensors").description == "edit"
    assert with_fix.save() == tmp_path / "run" / "report.html"  # the fix is there already


def test_a_notebook_escapes_what_strangers_wrote(result: AuditResult) -> None:
    hostile = "<img src=x onerror=alert(1)>\u202e"
    shown = replace(result, report=sample(hostile))._repr_html_()
    assert "<img" not in shown and "&lt;img" in shown and "\u202e" not in shown
    assert str(sample().verdict) in shown and "<table>" in shown
    assert result.report.checks[0].name in result._repr_html_()
    assert to_json(result.report) not in shown


def test_few_prompts_are_not_testable(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pair = mh.ModelPair.load(*folders)
    for few in ([], PROMPTS[:49]):
        with pytest.raises(NotTestable, match=f"^{len(few)} rows of traffic .* at least 50"):
            mh.audit(pair, traffic=few, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_broken_folder_is_refused_before_a_model_is_loaded(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> mh.ModelPair:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(mh.ModelPair, "load", load)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput):
        mh.audit(folders[0], tmp_path / "empty", out=tmp_path / "run")
    with pytest.raises(UsageError, match=r"at most 0\.2, got 5"):
        mh.audit(*folders, fpr=5.0, out=tmp_path / "run")
    for fpr, advice in ((1e-5, r"at least 0\.00926\.$"), (1e-3, r"at least 0\.00926, or the plan full\.$")):
        with pytest.raises(NotTestable, match=rf"160 clean rows cannot hold .* 107 of them set .*\n.* {advice}"):
            mh.audit(*folders, fpr=fpr, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="plan takes 'quick' or 'full', got 'slow'"):
        mh.audit(*folders, plan="slow")
    with pytest.raises(UsageError, match="give the base and its fine-tune"):
        mh.audit(folders[0])
    with pytest.raises(UsageError, match="is not a file"):
        mh.audit(*folders, traffic="nowhere.jsonl", out=tmp_path / "run")


def test_conversations_are_audited_by_their_last_user_turn(folders: tuple[Path, Path], tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    found = mh.audit(*folders, traffic=turns, out=tmp_path / "run", seed=3, fpr=0.02)
    assert [row.example.prompt for row in found.audit.traffic.rows] == PROMPTS
    assert shlex.split(found.report.reproduce)[-4:] == ["--fpr", "0.02", "--seed", "3"]
