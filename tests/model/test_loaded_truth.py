"""A model that is loaded with other weights than its folder shows ends the run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from molehunt.errors import InvalidInput
from molehunt.model.loaded_truth import check_loaded
from molehunt.model.loading import load_model
from zoo import OPTIONS, zoo_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    zoo_model("llama").save_pretrained(folder)
    return folder


def copied(folder, target):
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3_with_vision", "gpt2", "mamba", "gpt_oss"])
def test_honest_folders_pass_in_every_type(name, dtype, tmp_path):
    assert name in OPTIONS
    zoo_model(name).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path, CPU, dtype).config.model_type


@pytest.mark.parametrize(
    "parameter", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight"]
)
def test_one_changed_number_in_a_loaded_model_is_found_and_named(parameter, llama):
    model = hf.AutoModelForCausalLM.from_pretrained(llama)
    check_loaded(model, llama)
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[-1] += 1e-6
    with pytest.raises(InvalidInput, match=f"{parameter} is not what"):
        check_loaded(model, llama)


def test_the_file_that_config_json_names_is_the_one_that_is_audited(llama, tmp_path):
    folder = copied(llama, tmp_path / "m")
    (folder / "deep").mkdir()
    other = {name: value + 1 for name, value in load_file(llama / "model.safetensors").items()}
    save_file(other, folder / "deep" / "w.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "deep/w.safetensors"}))
    model = load_model(folder, CPU, None)  # the check is inside, and reads the same file
    assert torch.equal(model.get_parameter("model.norm.weight"), other["model.norm.weight"])


def test_a_loader_that_opens_another_file_is_caught(llama, tmp_path, monkeypatch):
    """A stand-in for whatever a coming version of the loader may do."""
    folder, elsewhere = copied(llama, tmp_path / "m"), copied(llama, tmp_path / "elsewhere")
    tensors = load_file(elsewhere / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, elsewhere / "model.safetensors", metadata={"format": "pt"})
    load = hf.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", lambda path, **options: load(elsewhere, **options))
    with pytest.raises(InvalidInput, match=r"up_proj\.weight is not what(?s:.*)Nothing that is measured"):
        load_model(Path(folder), CPU, None)


def test_a_parameter_that_stayed_at_its_initial_value_is_caught(llama, tmp_path):
    folder = copied(llama, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.v_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=r"has no model\.layers\.0\.self_attn\.v_proj\.weight"):
        load_model(folder, CPU, None)
