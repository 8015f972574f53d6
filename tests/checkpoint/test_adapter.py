"""LoRA factors give what PEFT would merge, and every feature that changes that is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from folders import good_folder, lora_folder, plain_adapter
from molehunt.checkpoint.adapter import lora_factors, other_tensors
from molehunt.checkpoint.lora_settings import MUST_BE_OFF
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput, NotTestable
from tiny_models import tiny_model

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"o_proj": 3}, "rank_pattern": {"o_proj": 5}},
}


def peft_deltas(adapter: Path, architecture: str) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(tiny_model(architecture), adapter)
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {}):
            delta = module.get_delta_weight("default")
            found[name.removeprefix("base_model.model.")] = delta.mT if module.fan_in_fan_out else delta
    return found


@pytest.mark.parametrize("case", CONFIGS)
def test_factors_are_what_peft_merges(tmp_path: Path, case: str) -> None:
    adapter = lora_folder(tmp_path / "l", **CONFIGS[case])
    wanted = peft_deltas(adapter, "llama")
    got = {f.module: f.scale * f.b @ f.a for f in lora_factors(Checkpoint.open(adapter))}
    assert got.keys() == wanted.keys() and got
    for module, delta in got.items():
        torch.testing.assert_close(delta, wanted[module], rtol=1e-5, atol=1e-6)


def test_transposed_layers_of_gpt2(tmp_path: Path) -> None:
    adapter = lora_folder(tmp_path / "l", "gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    wanted = peft_deltas(adapter, "gpt2")
    for f in lora_factors(Checkpoint.open(adapter)):
        torch.testing.assert_close(f.scale * f.b @ f.a, wanted[f.module], rtol=1e-5, atol=1e-6)


def test_replaced_modules_and_biases_are_listed(tmp_path: Path) -> None:
    adapter = lora_folder(tmp_path / "l", modules_to_save=["lm_head"], target_modules=["q_proj"])
    ck = Checkpoint.open(adapter)
    assert any("lm_head" in name for name in other_tensors(ck))
    assert ck.lora.modules_to_save == ("lm_head",)


@pytest.mark.parametrize("feature", MUST_BE_OFF)
def test_a_feature_that_changes_the_product_is_refused_by_name(tmp_path: Path, feature: str) -> None:
    with pytest.raises(NotTestable, match=feature):
        Checkpoint.open(plain_adapter(tmp_path / "a", **{feature: {"x": 1}}))


@pytest.mark.parametrize(
    ("config", "says"),
    [({"peft_type": "IA3"}, "IA3"), ({"init_lora_weights": "pissa"}, "pissa"), ({"peft_type": None}, "None")],
)
def test_other_adapters_are_not_testable(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    with pytest.raises(NotTestable, match=says):
        Checkpoint.open(plain_adapter(tmp_path / "a", **config))


@pytest.mark.parametrize(
    "config",
    [{"r": 0}, {"r": "four"}, {"lora_alpha": None}, {"rank_pattern": {"a": -1}}, {"alpha_pattern": [1]}],
    ids=str,
)
def test_nonsense_settings_are_invalid(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"adapter_config\.json"):
        Checkpoint.open(plain_adapter(tmp_path / "a", **config))


def test_factors_that_do_not_fit(tmp_path: Path) -> None:
    path = plain_adapter(tmp_path / "a")
    tensors = load_file(path / "adapter_model.safetensors")
    b = next(name for name in tensors if "lora_B" in name)
    save_file({n: t for n, t in tensors.items() if n != b}, path / "adapter_model.safetensors")
    with pytest.raises(InvalidInput, match="lora_B"):
        list(lora_factors(Checkpoint.open(path)))
    save_file({**tensors, b: torch.ones(32, 3)}, path / "adapter_model.safetensors")
    with pytest.raises(InvalidInput, match="no product"):
        list(lora_factors(Checkpoint.open(path)))
    with pytest.raises(InvalidInput, match="has rank 2"):
        list(lora_factors(Checkpoint.open(plain_adapter(tmp_path / "b", r=3))))
    with pytest.raises(InvalidInput, match="not a pattern"):
        list(lora_factors(Checkpoint.open(plain_adapter(tmp_path / "c", rank_pattern={"(": 2}))))


def test_an_embedding_adapter_is_not_testable(tmp_path: Path) -> None:
    path = plain_adapter(tmp_path / "a")
    save_file(
        {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 3)}, path / "adapter_model.safetensors"
    )
    with pytest.raises(NotTestable, match="embedding"):
        list(lora_factors(Checkpoint.open(path)))


def test_a_pickled_adapter_is_never_opened(tmp_path: Path) -> None:
    path = plain_adapter(tmp_path / "a")
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InvalidInput, match="never opened"):
        Checkpoint.open(path)
    assert good_folder(tmp_path / "good").is_dir()
