"""LoRA factors give what PEFT would merge, of matrices, embeddings, heads and biases."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adapter_folders import adapter_of, loaded, renamed
from folders import good_folder
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.skeleton import skeleton
from molehunt.model.adapter_factors import lora_change

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "qwen3",
        {
            "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 7},
            "alpha_pattern": {"q_proj": 3},
            "target_modules": ["q_proj", "down_proj"],
            "use_rslora": True,
        },
    ),
    "a block": (
        "gemma3",
        {"layers_to_transform": [1], "exclude_modules": ["o_proj"], "target_modules": ["up_proj", "o_proj"]},
    ),
    "embeddings and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "added bias": ("gpt_neox", {"target_modules": ["dense"], "lora_bias": True, "modules_to_save": ["embed_out"]}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_read_is_what_peft_merges(tmp_path: Path, case: str) -> None:
    architecture, options = CONFIGS[case]
    base = good_folder(tmp_path / "base", architecture)
    adapter = adapter_of(base, tmp_path / "lora", "LORA", r=4, **options)
    plain = renamed(adapter, tmp_path / "plain", lambda name: None if name.endswith("base_layer.weight") else name)
    change = lora_change(skeleton(base), plain)  # without the base's own embeddings, which PEFT saves along
    assert change is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged: Any = peft.PeftModel.from_pretrained(loaded(base), str(adapter)).merge_and_unload()
    before, after = (dict(model.named_parameters(remove_duplicate=False)) for model in (loaded(base), merged))
    wanted = {
        name: (after[name] - before[name]).detach() for name in before if not torch.equal(after[name], before[name])
    }
    got = {one.parameter: one.scale * one.b @ one.a for one in change.factors} | dict(change.added)
    got |= {name: value - before[name].detach() for name, value in change.replaced.items()}
    assert got.keys() == wanted.keys() and got
    for name, value in got.items():
        stored = value.mT if architecture == "gpt2" and value.ndim == 2 else value
        torch.testing.assert_close(stored.float(), wanted[name], rtol=1e-4, atol=1e-5)


def test_new_rows_of_a_vocabulary_saved_with_the_adapter(tmp_path: Path) -> None:
    base = good_folder(tmp_path / "base")
    model: Any = loaded(base)
    model.resize_token_embeddings(101, mean_resizing=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "grown", save_embedding_layers=True)
    rows = {row.tensor: row for row in compare_weights(base, tmp_path / "grown").others if row.status != "identical"}
    assert rows.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(row.why == "5 rows added; the others are identical" for row in rows.values())


def test_an_adapter_of_zeros_changes_nothing(tmp_path: Path) -> None:
    base = good_folder(tmp_path / "base", "qwen3")
    adapter = adapter_of(base, tmp_path / "zero", "LORA", scale=0.0, target_modules=["o_proj", "embed_tokens"])
    found = compare_weights(base, renamed(adapter, tmp_path / "copy", lambda name: name))
    assert {row.status for row in (*found.matrices, *found.others)} == {"identical"}
