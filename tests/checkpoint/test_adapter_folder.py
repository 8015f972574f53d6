"""Adapter folders are known by what they hold, and every field of their settings is known, read or refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from folders import edit_json, good_folder, lora_folder, plain_adapter
from molehunt.audit.files import compare_folders
from molehunt.checkpoint.adapter_folder import has_full_weights, is_adapter_folder
from molehunt.checkpoint.adapter_settings import (
    BY_EFFECT,
    HARMLESS,
    NO_WEIGHT_CHANGE,
    NOT_A_CHANGE,
    READ,
    parse_adapter,
)
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput, NotTestable

PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def test_every_field_of_lora_is_in_one_list() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    lists = (HARMLESS, READ, BY_EFFECT, frozenset(NOT_A_CHANGE))
    assert fields <= frozenset().union(*lists)
    assert sum(map(len, lists)) == len(frozenset().union(*lists))
    defaults = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    assert parse_adapter(json.loads(json.dumps(defaults, default=list))).reading == "factors"
    kinds = {kind.value for kind in peft.PeftType}
    assert NO_WEIGHT_CHANGE.keys() <= kinds


@pytest.mark.parametrize("field", sorted(BY_EFFECT | NOT_A_CHANGE.keys()))
def test_a_field_that_changes_the_arithmetic_is_never_read_as_factors(field: str) -> None:
    for value in ({}, {"x": 1}, [3], True):
        settings = parse_adapter({**PLAIN, field: value})
        if value == {} or value:
            assert settings.reading != "factors" and field in settings.why
    assert parse_adapter({**PLAIN, field: None}).reading == "factors"


@pytest.mark.parametrize(
    ("config", "reading"),
    [
        ({"peft_type": "IA3"}, "effect"),
        ({**PLAIN, "init_lora_weights": "pissa_niter_4"}, "effect"),
        ({**PLAIN, "init_lora_weights": "gaussian"}, "factors"),
        ({**PLAIN, "enable_lora": None, "merge_weights": False}, "factors"),  # of the first releases of PEFT
        ({**PLAIN, "enable_lora": [True, False]}, "none"),
        ({"peft_type": "PREFIX_TUNING"}, "none"),
        ({"peft_type": "XLORA"}, "none"),
        ({**PLAIN, "task_type": "TOKEN_CLS"}, "none"),
    ],
    ids=str,
)
def test_how_an_adapter_is_read(config: dict[str, Any], reading: str) -> None:
    settings = parse_adapter(config)
    assert settings.reading == reading
    if reading == "none":
        with pytest.raises(NotTestable, match="is not read"):
            settings.check_readable()


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0},
        {"r": "four"},
        {"lora_alpha": None},
        {"rank_pattern": {"a": -1}},
        {"alpha_pattern": [1]},
        {"peft_type": 3},
    ],
    ids=str,
)
def test_nonsense_settings_are_invalid(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"adapter_config\.json"):
        Checkpoint.open(plain_adapter(tmp_path / "a", **config))


def test_the_output_folder_of_a_trainer_is_an_adapter(tmp_path: Path) -> None:
    base, out = good_folder(tmp_path / "base"), lora_folder(tmp_path / "out")
    shutil.copy(base / "config.json", out)
    torch.save({"step": 3}, out / "optimizer.pt")
    torch.save({"lr": 1.0}, out / "training_args.bin")
    (out / "trainer_state.json").write_text("{}")
    assert is_adapter_folder(out) and not has_full_weights(out)
    opened = Checkpoint.open(out)
    assert opened.kind == "adapter" and "config.json of the base" in {trap.kind for trap in opened.findings}
    found = compare_folders(base, out)
    assert found.findings == 0 and found.identity is not None
    assert re.match(r"LoRA of rank \d+ changes 21 matrices \(", found.identity.kind)
    shutil.copy(base / "model.safetensors", out)
    assert has_full_weights(out) and not is_adapter_folder(out)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_any_file_of_full_weights_makes_it_a_model(tmp_path: Path, name: str) -> None:
    out = lora_folder(tmp_path / "out")
    (out / name).write_bytes(b"")
    assert is_adapter_folder(out)  # no config.json: nothing loads these
    (out / "config.json").write_text("{}")
    assert not is_adapter_folder(out)


def test_weights_that_are_not_opened_are_named(tmp_path: Path) -> None:
    path = plain_adapter(tmp_path / "a")
    weights = path / "adapter_model.safetensors"
    (path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert "adapter stored twice" in {trap.kind for trap in Checkpoint.open(path).findings}
    weights.unlink()
    with pytest.raises(InvalidInput, match="never opened"):
        Checkpoint.open(path)
    (path / "adapter_model.bin").unlink()
    (path / "adapter_model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(InvalidInput, match="Join the parts"):
        Checkpoint.open(path)


def test_adapters_in_subfolders_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "several"
    plain_adapter(folder / "first")
    plain_adapter(folder / "second")
    with pytest.raises(InvalidInput, match="subfolders; give one: first, second"):
        Checkpoint.open(folder)
    shutil.copytree(folder / "first", folder, dirs_exist_ok=True)
    (trap,) = (trap for trap in Checkpoint.open(folder).findings if trap.kind == "several adapters")
    assert "first, second" in trap.what and trap.severity == "note"


def test_files_says_what_an_adapter_is_and_whether_it_loads(tmp_path: Path) -> None:
    base, adapter = good_folder(tmp_path / "base"), lora_folder(tmp_path / "lora")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="someone/other-model")
    rows = {row.key: row for row in compare_folders(base, adapter).rows}
    assert "read from its factors" in rows["peft_type"].why
    assert rows["base_model_name_or_path"].severity == "note"
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="C:\\models\\base", use_dora=True)
    rows = {row.key: row for row in compare_folders(base, adapter).rows}
    assert "base_model_name_or_path" not in rows and "it uses use_dora" in rows["peft_type"].why

    edit_json(adapter / "adapter_config.json", use_dora=None, target_modules=["v_proj"])
    found = compare_folders(base, adapter)
    assert found.exit_code == 1
    assert any(row.key == "does not load" and row.severity == "finding" for row in found.rows)
    for kind, why in (("PROMPT_TUNING", "virtual tokens"), ("QQQ", "no product of two factors")):
        edit_json(adapter / "adapter_config.json", peft_type=kind)
        assert any(why in row.why for row in compare_folders(base, adapter).rows)
