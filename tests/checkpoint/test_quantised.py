"""Layouts that can be undone exactly are; others are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from folders import edit_json, good_folder
from molehunt.checkpoint.quantised import recognise
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import NotTestable

NAME = "model.layers.0.mlp.down_proj.weight"


def quantise(
    folder: Path, stored: torch.Tensor, scale: torch.Tensor, suffix: str, config: dict[str, Any]
) -> Checkpoint:
    weights = load_file(folder / "model.safetensors")
    weights |= {NAME: stored, NAME.removesuffix(".weight") + suffix: scale}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", quantization_config=config)
    return Checkpoint.open(folder)


def test_fp8_with_one_scale_and_with_blocks(tmp_path: Path) -> None:
    stored = torch.randn(32, 48).to(torch.float8_e4m3fn)
    one = quantise(good_folder(tmp_path / "a"), stored, torch.tensor([0.5]), ".weight_scale", {"quant_method": "fp8"})
    assert torch.equal(one.tensor(NAME), stored.float() * 0.5)
    scale = torch.rand(2, 3) + 0.5
    blocks = quantise(good_folder(tmp_path / "b"), stored, scale, ".weight_scale_inv", {"quant_method": "fp8"})
    wanted = stored.float() * scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(blocks.tensor(NAME), wanted)
    assert not any("scale" in name for name in blocks.names())


def test_int8_with_a_scale_per_row(tmp_path: Path) -> None:
    stored, scale = torch.randint(-127, 127, (32, 48), dtype=torch.int8), torch.rand(32)
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    ck = quantise(good_folder(tmp_path / "a"), stored, scale, ".weight_scale", config)
    assert torch.equal(ck.tensor(NAME), stored.float() * scale[:, None])
    assert ck.tensor("model.norm.weight").dtype == torch.float32


def test_a_scale_that_does_not_fit(tmp_path: Path) -> None:
    stored = torch.randn(32, 48).to(torch.float8_e4m3fn)
    ck = quantise(good_folder(tmp_path / "a"), stored, torch.ones(5), ".weight_scale", {"quant_method": "fp8"})
    with pytest.raises(NotTestable, match="does not fit"):
        ck.tensor(NAME)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, {"a.qweight", "a.scales"}),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, {"a.q_proj.weight", "a.q_proj.weight.absmax"}),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            {"a.weight_packed"},
        ),
        ({}, {"a.qweight"}),
    ],
    ids=["gptq", "bitsandbytes", "compressed-tensors", "none"],
)
def test_layouts_that_lose_something_are_not_testable(config: dict[str, Any], names: set[str]) -> None:
    found = recognise(config, frozenset(names))
    assert found is not None and (not found.exact or found.method.endswith("/pack-quantized"))
    name = sorted(found.packed)[0]
    with pytest.raises(NotTestable, match="cannot be undone"):
        found.dequantise(name, torch.ones(1), lambda _: torch.ones(1))


def test_plain_weights_are_not_quantised() -> None:
    assert recognise({}, frozenset({"a.weight"})) is None
    only_scales = recognise({}, frozenset({"a.weight", "a.weight_scale"}))
    assert only_scales is not None and only_scales.exact


LAYER = "a.weight"


def undone(config: dict[str, Any], stored: torch.Tensor, **parts: torch.Tensor) -> torch.Tensor:
    found = recognise({"quantization_config": config}, frozenset({LAYER, *(f"a.{name}" for name in parts)}))
    assert found is not None
    return found.dequantise(LAYER, stored, lambda name: parts[name.removeprefix("a.")])


@given(st.sampled_from([1, 8, 48]), st.integers(0, 2**31))
def test_integers_with_zero_points_come_back(group: int, seed: int) -> None:
    torch.manual_seed(seed)
    stored = torch.randint(-128, 128, (6, 48), dtype=torch.int8)
    scale, zero = torch.rand(6, 48 // group) + 0.1, torch.randint(-9, 9, (6, 48 // group), dtype=torch.int8)
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    spread = [part.float().repeat_interleave(group, 1) for part in (zero, scale)]
    back = undone(config, stored, weight_scale=scale, weight_zero_point=zero)
    assert torch.equal(back, (stored.float() - spread[0]) * spread[1])


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "fp8", "weight_block_size": [16, 8]},
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"block_structure": [16, 8]}}},
        },
    ],
)
def test_the_last_block_may_be_cut_where_the_config_tells_its_size(config: dict[str, Any]) -> None:
    stored = torch.ones(17, 20).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 7).view(2, 3)
    back = undone(config, stored, weight_scale_inv=scale)
    assert back[15, 7] == 1 and back[15, 8] == 2 and back[16, 19] == 6
    with pytest.raises(NotTestable, match="does not fit"):
        undone({"quant_method": "fp8"}, stored, weight_scale_inv=scale)


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "hqq", "modelopt"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn])
def test_codes_without_a_scale_are_no_weights(method: str, dtype: torch.dtype) -> None:
    with pytest.raises(NotTestable, match=method):
        undone({"quant_method": method}, torch.ones(2, 2).to(dtype))
    plain = torch.ones(2, 2, dtype=torch.bfloat16)
    assert undone({"quant_method": method}, plain) is plain


def test_bitsandbytes_weights_of_any_name() -> None:
    names = {
        "h.0.c_attn.weight",
        "h.0.c_attn.weight.quant_state.bitsandbytes__nf4",
        "h.1.dense.weight",
        "h.1.dense.SCB",
    }
    found = recognise({"quantization_config": {"quant_method": "bitsandbytes"}}, frozenset({*names, "norm.weight"}))
    assert found is not None and found.packed == names
