"""The matrix of what is read: its truth comes from models in memory, its judge can say no, and a crash is a result."""

import copy
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.__main__ import main
from experiments.records import append_record
from experiments.setting import Setting
from experiments.what_is_read.adapter_savings import ADAPTERS
from experiments.what_is_read.case import Saving, whole
from experiments.what_is_read.cell import no_answer
from experiments.what_is_read.check_folders import check_directions, check_files, differs
from experiments.what_is_read.command import Ran, run
from experiments.what_is_read.isolated import isolated
from experiments.what_is_read.measure import DEEP, QUICK, SAVINGS, savings_of
from experiments.what_is_read.planted import SIGMAS, Change, changes, plant_, plants
from experiments.what_is_read.table import LONGEST_REASON, failures, plain, table
from experiments.what_is_read.whole_savings import WHOLE
from experiments.what_is_read.zoo import ARCHITECTURES, NO_DECODER, WRAPPED, zoo_model
from molehunt.audit.plan import PLANS

SAVING = Saving(name="single", what="one file", make=whole(lambda model, folder: None))
TRUTH = [Change("model.layers.1.mlp.down_proj.weight", 1, 1.1, 0.1)]


def row(**changed: Any) -> dict[str, Any]:
    plain_row = {"tensor": "model.layers.1.mlp.down_proj.weight", "layer": 1, "role": "down", "status": "changed"}
    return {**plain_row, "strengths": [1.1], "rel_norm": 0.1, "why": "", **changed}


def cell(status: str, why: str = "", numbers: tuple[float, ...] = ()) -> dict[str, Any]:
    output = "what it printed" if status == "WRONG" else ""
    return {"status": status, "why": why, "output": output, "numbers": list(numbers)}


def setting(folder: Path) -> Setting:
    return Setting(topic="what-is-read", quick=True, out=folder, bench=folder)


def test_the_matrix_is_as_large_as_it_has_to_be() -> None:
    assert len(ARCHITECTURES) >= 30 and {*WRAPPED, *NO_DECODER, *DEEP, *QUICK} <= set(ARCHITECTURES)
    assert len(WHOLE) >= 12 and len({saving.name for saving in SAVINGS}) == len(SAVINGS)
    unknown = {name for saving in SAVINGS for name in saving.on or () if name not in ARCHITECTURES}
    assert unknown == set()
    assert all(saving.why for saving in SAVINGS if saving.may), "a refusal that counts as right has a reason"
    assert not {saving.name for saving in savings_of("t5", quick=False)} & {saving.name for saving in ADAPTERS}
    assert [saving.name for saving in savings_of("llama", quick=True)] == list(QUICK["llama"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "mamba2", "llava", "bert"])
def test_what_is_planted_is_what_differs_and_nothing_else(name: str) -> None:
    base = zoo_model(name)
    tuned, planted = copy.deepcopy(base), plants(base)
    assert changes(base, tuned) == []
    plant_(tuned, planted)
    found = changes(base, tuned)
    assert {(one.name, 1) for one in planted} == {(one.name, one.layer) for one in found} or name == "bert"
    assert [one.sigma for one in found] == pytest.approx(SIGMAS[: len(planted)], rel=1e-4)
    linear = plants(base, only_linear=True)
    assert all(one.expert is None for one in linear) and len(linear) <= len(planted)


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([row()], ""),
        ([row(), row(tensor="model.layers.0.mlp.up_proj.weight", layer=0, status="identical", strengths=[])], ""),
        ([row(layer=None, role=None, strengths=[], tensor="model.layers.1.mlp.down_proj.weight")], ""),
        ([row(strengths=[1.2])], "missed"),
        ([row(layer=2)], "missed"),
        ([row(status="identical", strengths=[])], "missed"),
        ([row(status="not testable", strengths=[])], "missed"),
        ([row(layer=None, strengths=[], rel_norm=0.2)], "missed"),
        ([], "missed"),
        ([row(), row(tensor="lm_head.weight", layer=None, strengths=[], rel_norm=0.5)], "says that lm_head"),
        ([row(), row()], "says that model.layers.1"),
    ],
)
def test_the_judge_of_directions_says_what_was_missed_and_what_was_made_up(
    rows: list[dict[str, Any]], fault: str
) -> None:
    said = differs(TRUTH, rows, SAVING)
    assert bool(said) == bool(fault) and fault in said


@pytest.mark.parametrize(
    ("code", "may", "command", "status"),
    [
        (4, (), "files", "WRONG"), (4, ("files",), "files", "refused"), (3, ("files",), "files", "NOT TESTABLE"),
        (3, ("files",), "read", "WRONG"), (70, ("files",), "files", "WRONG"), (9, ("files",), "files", "WRONG"),
        (0, (), "files", None), (1, (), "files", None),
    ],
)  # fmt: skip
def test_a_refusal_is_right_only_where_the_way_of_saving_leaves_no_choice(
    code: int, may: tuple[str, ...], command: str, status: str | None
) -> None:
    saving = Saving(name="x", what="x", make=SAVING.make, may=may, why="x")
    out = json.dumps({"rows": []} if code in (0, 1) else {"error": "cannot", "exit_code": code})
    found = no_answer(Ran(words=("x",), code=code, out=out, err=""), command, saving, no_decoder=False)
    assert (found.status if found else None) == status


def test_a_command_is_run_with_its_code_and_output(tmp_path: Path) -> None:
    ran = run(["files", str(tmp_path / "a"), str(tmp_path / "b"), "--json"])
    assert ran.code == 2 and ran.payload["exit_code"] == 2 and str(ran.code) in ran.shown() and not ran.fault
    assert Ran(words=(), code=1, out="", err="Traceback (most recent call last)\nE: x").fault == "traceback: E: x"


def test_an_unchanged_folder_that_was_tampered_with_is_seen_by_the_checks(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    case = next(saving for saving in WHOLE if saving.name == "single").make("llama", tmp_path)
    saving = next(saving for saving in WHOLE if saving.name == "single")
    assert check_directions(case, saving, no_decoder=False).status == "works"
    assert check_files(case, saving, no_decoder=False).status == "works"
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"] += torch.outer(torch.ones(48), torch.ones(32)) / 20
    save_file(tensors, file, metadata={"format": "pt"})
    found = check_directions(case, saving, no_decoder=False)
    assert found.status == "WRONG" and "unchanged copy changed in model.layers.2.mlp.up_proj" in found.why
    (tmp_path / "tuned" / "generation_config.json").write_text('{"sequence_bias": [[[5], 9.0]]}')
    assert check_files(case, saving, no_decoder=False).status == "WRONG"


def test_what_happens_in_a_child_is_a_result_here() -> None:
    assert isolated(lambda: {"n": 3}, seconds=20.0) == {"n": 3}
    assert "ZeroDivisionError" in isolated(lambda: {"n": 1 // 0}, seconds=20.0)["crashed"]
    assert isolated(lambda: os.kill(os.getpid(), signal.SIGSEGV) or {}, seconds=20.0)["crashed"].endswith("SIGSEGV")
    start = time.monotonic()
    assert "more than" in isolated(lambda: time.sleep(60) or {}, seconds=0.2)["crashed"]
    assert time.monotonic() - start < 10


def test_a_wrong_cell_ends_the_command_with_1_and_stands_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "what-is-read.jsonl"
    words = ["what-is-read", "--quick", "--table", "--out", str(tmp_path)]
    good = {
        "single": {"files": cell("works"), "directions": cell("works")},
        "pickled": {"files": cell("refused", "no")},
    }
    append_record(records, "llama", good)
    assert main(words) == 0 and failures({"llama": good}) == []
    page = (tmp_path / "what-is-read.md").read_text()
    assert "2 ways: 3 cells" in " ".join(page.split()) and "| llama | ✓✓ | – |" in page and "✗ gave" not in page
    append_record(records, "bert", {"single": {"files": cell("WRONG", "it says so"), "directions": cell("works")}})
    assert main(words) == 1
    page = (tmp_path / "what-is-read.md").read_text()
    assert (
        "1 cell ✗ gave a wrong answer" in " ".join(page.split()) and "| bert | ✗✓ |  |" in page and "it says so" in page
    )
    assert "bert / single / files: it says so\nwhat it printed" in capsys.readouterr().err


def test_reasons_of_one_kind_are_one_row(tmp_path: Path) -> None:
    found = {
        name: {"single": {"files": cell("WRONG", f"/x/{name}/base: model.layers.{i}.mlp.w1.weight is off by 0.12345")}}
        for i, name in enumerate(("llama", "gpt2"))
    }
    assert plain("a|b " * 40).count("\\|") and len(plain("word " * 60)) <= LONGEST_REASON
    (line,) = [one for one in table(found, setting(tmp_path)).splitlines() if "off by" in one]
    assert line == "| ✗ | single | files | 2 | base: TENSOR is off by … |"


def test_the_same_weights_have_to_measure_the_same() -> None:
    single = {"watch": cell("works", numbers=(1.0, 2.5))}
    found = {"llama": {"single": single, "sharded": single, "bf16": {"watch": cell("works", numbers=(7.0, 2.5))}}}
    assert failures(found) == []
    found["llama"]["in-memory"] = {"watch": cell("works", numbers=(1.0, 2.7))}
    (wrong,) = failures(found)
    assert wrong.startswith("llama / in-memory / watch: it measures something else")


def test_the_quick_plan_is_put_back() -> None:
    from experiments.what_is_read.command import PLAN, small_audits

    before = PLANS["quick"]
    with pytest.raises(KeyError), small_audits():
        assert PLANS["quick"] is PLAN
        raise KeyError
    assert PLANS["quick"] is before
