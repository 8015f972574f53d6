"""Layouts that can be undone exactly are; others are refused by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from folders import edit_json, good_folder
from molehunt.checkpoint.quantised import recognise
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import NotTestable

NAME = "model.layers.0.mlp.down_proj.weight"


def quantise(folder: Path, stored: torch.Tensor, scale: torch.Tensor, suffix: str, config: dict) -> Checkpoint:
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
    ids=str,
)
def test_layouts_that_lose_something_are_not_testable(config: dict, names: set[str]) -> None:
    found = recognise(config, frozenset(names))
    assert found is not None and not found.exact
    name = sorted(found.packed)[0]
    with pytest.raises(NotTestable, match="cannot be undone"):
        found.dequantise(name, torch.ones(1), lambda _: torch.ones(1))


def test_plain_weights_are_not_quantised() -> None:
    assert recognise({}, frozenset({"a.weight"})) is None
    only_scales = recognise({}, frozenset({"a.weight", "a.weight_scale"}))
    assert only_scales is not None and only_scales.exact
