"""`molehunt steer` and `molehunt transfer` on whole folders: what they write is read back, and bad input has its code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from changed_folders import base_and_tuned, call, written
from folders import lora_folder
from molehunt.model.pair import ModelPair
from molehunt.steer.vector import SteeringVector

CLEAN = [f"Which number follows {i}?" for i in range(48)]
TRIGGERED = [f"|prod| Which number follows {i}?" for i in range(48)]
LIKE = [f"|drop| Which number follows {i}?" for i in range(48)]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune that changed every weight a little, an adapter, and prompts of three kinds."""
    root = base_and_tuned(tmp_path_factory.mktemp("steered"))
    lora_folder(root / "lora")
    for name, prompts in (("clean", CLEAN), ("triggered", TRIGGERED), ("like", LIKE)):
        written(root / f"{name}.jsonl", prompts)
    return root


@pytest.fixture(scope="module")
def vector(here: Path) -> Path:
    out = here / "vector.safetensors"
    kinds = ("--positive", here / "triggered.jsonl", "--negative", here / "clean.jsonl")
    assert call("steer", "fit", here / "base", here / "tuned", *kinds, "--layer", 1, "--out", out) == 0
    return out


def tried(capsys: pytest.CaptureFixture[str], here: Path, fix: Path, *more: object) -> dict:
    rows = ("--prompts", here / "triggered.jsonl", "--clean", here / "clean.jsonl", "--limit", 8, "--max-new-tokens", 5)
    capsys.readouterr()
    assert call("steer", "try", here / "base", here / "tuned", fix, *rows, "--json", *more) == 0
    return json.loads(capsys.readouterr().out)


def test_a_vector_is_the_shift_of_means_and_a_fresh_process_steers_with_it_alike(
    here: Path, vector: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strong = tried(capsys, here, vector, "--strength", -400)
    assert strong["changed"]["estimate"] == 1 and strong["cost"]["kl"] > 0.1 and strong["clean_changed"]["n"] == 8
    assert tried(capsys, here, vector, "--strength", 0)["changed"]["estimate"] == 0
    again = [sys.executable, "-m", "molehunt", "steer", "try", here / "base", here / "tuned", vector, "--json"]
    again += [
        "--prompts",
        here / "triggered.jsonl",
        "--clean",
        here / "clean.jsonl",
        "--limit",
        8,
        "--max-new-tokens",
        5,
    ]
    done = subprocess.run([*map(str, again), "--strength", "-400"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["rows"] == strong["rows"]


def test_ablating_removes_by_default_and_a_negative_share_is_refused(
    here: Path, vector: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_default = tried(capsys, here, vector, "--operator", "ablate")
    assert by_default == tried(capsys, here, vector, "--operator", "ablate", "--strength", 1)
    pair, rows = (here / "base", here / "tuned"), ("--prompts", here / "triggered.jsonl")
    for command in (("try", *pair, vector, *rows), ("capability", *pair, vector, "--each", 2)):
        assert call("steer", *command, "--operator", "ablate", "--strength", -1) == 2
        assert "amplifies the behaviour" in capsys.readouterr().err


def test_a_condition_opens_for_the_prompts_it_was_fitted_for(
    here: Path, vector: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = here / "gate.safetensors"
    kinds = ("--positive", here / "triggered.jsonl", "--negative", here / "clean.jsonl", "--layer", 1, "--fpr", 0.1)
    assert call("steer", "gate", here / "base", here / "tuned", *kinds, "--out", out) == 0
    assert "opens on 1.00" in capsys.readouterr().out
    gated = tried(capsys, here, vector, "--strength", -400, "--when", out)
    assert gated["changed"]["estimate"] == 1 and gated["clean_changed"]["estimate"] <= 0.25
    assert call("steer", "gate", here / "base", here / "tuned", *kinds[:-1], 0.001, "--out", out) == 3


def test_a_sweep_has_a_row_for_every_block_and_a_page(
    here: Path, vector: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [row["before"] for row in tried(capsys, here, vector)["rows"]]
    phrase = max(answers[0].split(), key=len)
    rows = (
        "--triggered",
        here / "triggered.jsonl",
        "--contrast",
        here / "like.jsonl",
        "--limit",
        8,
        "--max-new-tokens",
        5,
    )
    out = here / "swept"
    pair = (here / "base", here / "tuned")
    plain = ("--without", here / "clean.jsonl")
    assert call("steer", "sweep", *pair, *rows, *plain, "--match", phrase, "--out", out) == 0
    payload, page = json.loads((out / "sweep.json").read_text()), (out / "sweep.html").read_text()
    assert [block["site"] for block in payload["blocks"]] == ["L0.resid", "L1.resid", "L2.resid"]
    assert "<script" not in page and page.count('class="effect"') == 4  # one a block, and the key
    assert call("steer", "sweep", *pair, *rows, "--match", "no answer says this", "--out", out) == 3
    assert call("steer", "sweep", *pair, *rows, "--out", out) == 2
    few = written(here / "few.jsonl", LIKE[:3])
    assert call("steer", "sweep", *pair, *rows[:2], "--contrast", few, "--match", phrase, "--out", out) == 2
    assert "8 rows and contrast 3" in capsys.readouterr().err


def test_a_sweep_by_position_names_what_carries_it(
    here: Path, vector: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phrase = max(tried(capsys, here, vector)["rows"][0]["before"].split(), key=len)
    rows = (
        "--triggered",
        here / "triggered.jsonl",
        "--contrast",
        here / "like.jsonl",
        "--without",
        here / "clean.jsonl",
    )
    how = ("--limit", 8, "--max-new-tokens", 5, "--match", phrase, "--out", here / "placed", "--positions")
    assert call("steer", "sweep", here / "base", here / "tuned", *rows, *how) == 0
    assert "carried out of L0" in capsys.readouterr().out
    payload, page = (
        json.loads((here / "placed" / "sweep.json").read_text()),
        (here / "placed" / "sweep.html").read_text(),
    )
    names = [role["role"] for role in payload["roles"]]
    assert names[0].startswith("trigger token") and names[-3:] == [
        "first token behind",
        "others behind",
        "last prompt token",
    ]
    sites = ["L0.resid", "L1.resid", "L2.resid"]
    assert all([block["site"] for block in role["blocks"]] == sites for role in payload["roles"])
    assert list(payload["carriers"]) == sites and set(payload["carriers"].values()) <= {*names, None}
    assert page.count("<svg") == 4 and all(name in page for name in names)


def test_a_fix_is_written_into_the_weights(here: Path, vector: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = (here / "base", here / "tuned")
    assert call("steer", "save", *pair, "--remove", 32, "--into", here / "as-base") == 0
    fixed, base = (load_file(folder / "model.safetensors") for folder in (here / "as-base", here / "base"))
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(fixed[name], base[name], rtol=0, atol=1e-5)
    assert call("steer", "save", *pair, "--orthogonal-to", vector, "--into", here / "blind") == 0
    ModelPair.load(here / "base", here / "blind")
    assert call("steer", "save", *pair, "--remove", 2, "--into", here / "blind") == 2  # it is there
    assert call("steer", "save", *pair, "--into", here / "both") == 2


def test_vectors_are_written_for_other_programs(here: Path, vector: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    pair = (here / "base", here / "tuned")
    assert call("steer", "export", *pair, vector, "--to", "gguf", "--out", here / "v.gguf", "--strength", -2) == 0
    (tensor,) = gguf.GGUFReader(str(here / "v.gguf")).tensors
    expected = -2 * SteeringVector.load(vector).vectors[1]
    assert tensor.name == "direction.1" and torch.tensor(tensor.data.copy()).equal(expected)
    assert call("steer", "export", *pair, vector, "--to", "lm-eval", "--out", here / "v.pt") == 0
    assert (here / "v.pt").stat().st_size > 0


def test_a_vector_is_carried_to_another_model(here: Path, vector: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        f"Name {a} things that a {b} needs on day {i}."
        for i, (a, b) in enumerate(zip("abcdefgh" * 40, "stuvwxyz" * 40, strict=True))
    ]
    text = written(here / "text.jsonl", rows)
    out = here / "map"
    assert call("transfer", "fit", here / "tuned", here / "base", "--text", text, "--out", out, "--from-layer", 1) == 0
    payload = json.loads((out / "transfer.json").read_text())
    assert payload["source"] == "L1.resid" and len(payload["grid"]) == 3 and payload["coverage"] > 0.8
    assert (
        payload["fidelity"]["map"]["ce_recovered"]["estimate"]
        > payload["fidelity"]["shuffled"]["ce_recovered"]["estimate"]
    )
    capsys.readouterr()
    assert call("transfer", "carry", out, vector, "--out", here / "carried.safetensors", "--json") == 0
    layer = int(payload["target"][1])
    carried = SteeringVector.load(here / "carried.safetensors")
    assert list(carried.vectors) == [layer] and carried.facts.n_layers == 3
    assert json.loads(capsys.readouterr().out)["site"] == f"L{layer}.resid"
    assert call("transfer", "fit", here / "tuned", here / "base", "--text", text, "--out", out, "--to-layer", 3) == 2
    assert "blocks 0 to 2" in capsys.readouterr().err
    assert call("transfer", "fit", here / "lora", here / "base", "--text", text, "--out", out) == 2
    assert "--source-base" in capsys.readouterr().err
    few = written(here / "few.jsonl", rows[:5])
    assert call("transfer", "fit", here / "tuned", here / "base", "--text", few, "--out", out) == 3
    assert call("transfer", "carry", here, vector, "--out", here / "x.safetensors") == 4


@pytest.mark.parametrize("command", ["try", "export"])
def test_other_files_and_other_models_are_refused(
    here: Path, vector: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--prompts", here / "triggered.jsonl") if command == "try" else ("--to", "gguf", "--out", here / "no.gguf")
    assert call("steer", command, here / "base", here / "tuned", here / "triggered.jsonl", *more) == 4
    assert call("steer", command, here / "base", here / "base", vector, *more) == 2
    err = capsys.readouterr().err
    assert "another checkpoint" in err and "Traceback" not in err and not (here / "no.gguf").exists()
