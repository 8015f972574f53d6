"""Weights are compared as they are loaded: the way in which a folder stores them changes no result."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from molehunt.audit.files import compare_folders
from molehunt.audit.weights import compare_weights
from zoo import zoo_model

FUSED = ("qwen3_moe", "mixtral", "jamba", "qwen3_next")
MIXERS = {
    "mamba": "backbone.layers.1.mixer.out_proj.weight",
    "mamba2": "backbone.layers.1.mixer.in_proj.weight",
    "lfm2": "model.layers.0.conv.out_proj.weight",
    "rwkv": "rwkv.blocks.1.attention.output.weight",
    "recurrent_gemma": "model.layers.0.temporal_block.linear_out.weight",
    "qwen3_next": "model.layers.0.linear_attn.in_proj_qkvz.weight",
}


def planted(model, name, *, expert=None, size=2.0):
    """The singular value of a rank-1 change, which is made in one matrix of a model."""
    weight = model.get_parameter(name)
    matrix = weight if expert is None else weight[expert]
    draw = torch.Generator().manual_seed(7)
    left, right = (torch.nn.functional.normalize(torch.randn(n, generator=draw), dim=0) for n in matrix.shape)
    with torch.no_grad():
        matrix += size * torch.outer(left, right)
    return size


def changed(found):
    return {row.tensor: row for row in (*found.matrices, *found.others) if row.status != "identical"}


@pytest.mark.parametrize("name", [*FUSED, "gemma3_with_vision", "gpt2"])
def test_one_model_saved_in_two_ways_is_identical(name, tmp_path):
    model = zoo_model(name)
    for folder, way in (("a", True), ("b", False)):
        model.save_pretrained(tmp_path / folder, save_original_format=way)
    found = compare_weights(tmp_path / "a", tmp_path / "b")
    assert found.outcome == "NO FINDING" and not changed(found)
    compared = compare_folders(tmp_path / "a", tmp_path / "b")
    assert compared.findings == 0 and len(compared.rows) <= 3


@pytest.mark.parametrize("ways", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", FUSED)
def test_a_change_of_one_expert_is_found_in_it_alone_however_both_are_saved(name, ways, tmp_path):
    model = zoo_model(name)
    model.save_pretrained(tmp_path / "a", save_original_format=ways[0])
    fused = next(n for n, _ in model.named_parameters() if n.endswith("experts.down_proj"))
    size = planted(model, fused, expert=2)
    model.save_pretrained(tmp_path / "b", save_original_format=ways[1])
    found = changed(compare_weights(tmp_path / "a", tmp_path / "b"))
    ((tensor, row),) = found.items()
    assert ".2." in tensor.split("experts")[1]
    assert row.role == "down"
    assert row.strengths == pytest.approx((size,), rel=1e-4)


def test_experts_that_are_stored_input_first_write_their_columns(tmp_path):
    model = zoo_model("gpt_oss")
    model.save_pretrained(tmp_path / "a")
    planted(model, "model.layers.1.mlp.experts.down_proj", expert=1)
    model.save_pretrained(tmp_path / "b")
    found = compare_weights(tmp_path / "a", tmp_path / "b")
    (direction,) = found.all_directions()
    before, after = (
        load_file(tmp_path / side / "model.safetensors")["model.layers.1.mlp.experts.down_proj"][1] for side in "ab"
    )
    written = torch.linalg.svd(after - before).Vh[0]  # [in out]: what is written stands in the rows of Vh
    assert abs(float(direction.vector @ written)) > 0.999


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_are_compared(name, tmp_path):
    model = zoo_model(name)
    model.save_pretrained(tmp_path / "a")
    size = planted(model, MIXERS[name])
    model.save_pretrained(tmp_path / "b")
    found = compare_weights(tmp_path / "a", tmp_path / "b")
    ((tensor, row),) = changed(found).items()
    assert found.outcome == "DIRECTIONS FOUND" and tensor == MIXERS[name]
    assert row.role and row.strengths == pytest.approx((size,), rel=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "mamba", "mixtral", "rwkv"])
def test_identical_is_never_said_while_a_tensor_changed(name, tmp_path):
    zoo_model(name).save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    for number, (tensor, value) in enumerate(sorted(tensors.items())):
        if number % 11 == len(name) % 11 and value.is_floating_point():  # a sample: all take minutes
            shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
            save_file({**tensors, tensor: value + 0.5}, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
            found = compare_weights(tmp_path / "a", tmp_path / "b")
            assert found.outcome != "NO FINDING", tensor
            assert changed(found), tensor


def test_an_untied_head_is_compared_with_the_embedding_that_the_base_ties_it_to(tmp_path):
    model = zoo_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    model.config.tie_word_embeddings = False
    for folder, extra in (("same", 0.0), ("other", 0.5)):
        model.save_pretrained(tmp_path / folder)
        head = tensors["model.embed_tokens.weight"] + extra
        both = {**tensors, "lm_head.weight": head}
        save_file(both, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    assert not changed(compare_weights(tmp_path / "a", tmp_path / "same"))
    assert list(changed(compare_weights(tmp_path / "a", tmp_path / "other"))) == ["lm_head.weight"]


def test_of_two_copies_the_loaded_one_is_compared_and_the_other_named(tmp_path):
    zoo_model("llama").save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    down = "model.layers.1.mlp.down_proj.weight"
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copies = {name.removeprefix("model."): value.clone() for name, value in tensors.items()}
    copies[down.removeprefix("model.")] += 0.1
    save_file({**tensors, **copies}, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    found = compare_weights(tmp_path / "a", tmp_path / "b")
    rows = changed(found)
    assert rows[down].strengths and f"{down} (not loaded)" in rows
    assert {name for name, row in rows.items() if row.strengths} == {down}
    assert compare_folders(tmp_path / "a", tmp_path / "b").findings >= len(tensors) - 1
