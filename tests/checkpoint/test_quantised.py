"""Layouts that can be undone exactly are; others are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from folders import edit_json, good_folder
from molehunt.checkpoint.inventory import Entry
from molehunt.checkpoint.loaded_view import LoadedView
from molehunt.checkpoint.quant_settings import OTHERS, READ
from molehunt.checkpoint.quantised import recognise
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput, NotTestable

NAME = "model.layers.0.mlp.down_proj.weight"


def quantise(
    folder: Path, stored: torch.Tensor, scale: torch.Tensor, suffix: str, config: dict[str, Any] | None
) -> Checkpoint:
    weights = load_file(folder / "model.safetensors")
    weights |= {NAME: stored, NAME.removesuffix(".weight") + suffix: scale}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        edit_json(folder / "config.json", quantization_config=config)
    return Checkpoint.open(folder)


def test_fp8_with_one_scale_and_with_blocks(tmp_path: Path) -> None:
    stored = torch.randn(32, 48).to(torch.float8_e4m3fn)
    one = quantise(
        good_folder(tmp_path / "a"), stored, torch.tensor([0.5]), ".weight_scale_inv", {"quant_method": "fp8"}
    )
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
    ck = quantise(good_folder(tmp_path / "a"), stored, torch.ones(5), ".weight_scale_inv", {"quant_method": "fp8"})
    with pytest.raises(NotTestable, match="does not fit"):
        ck.tensor(NAME)


def entries(*names: str, dtype: str = "BF16") -> dict[str, Entry]:
    return {name: Entry(name, dtype, (2, 2), 0, 0) for name in names}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"quant_method": "gptq"}, {"a.qweight", "a.scales"}),
        ({"load_in_4bit": True}, {"a.q_proj.weight", "a.q_proj.weight.absmax"}),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, {"a.weight_packed"}),
    ],
    ids=["gptq", "bitsandbytes", "compressed-tensors"],
)
def test_layouts_that_lose_something_are_not_testable(config: dict[str, Any], names: set[str]) -> None:
    found = recognise({"quantization_config": config}, entries(*names, dtype="U8"))
    assert found is not None and (not found.exact or found.method.endswith("/pack-quantized"))
    name = sorted(found.packed)[0]
    with pytest.raises(NotTestable, match="cannot be undone"):
        found.dequantise(name, torch.ones(1), lambda _: torch.ones(1))


SCALES = (
    ".weight_scale", ".weight_scale_inv", ".scale_weight", ".SCB", ".weight.absmax", ".qweight", ".weight_packed",
    ".weight.quant_state.bitsandbytes__nf4", ".scale", ".weight_zero_point",
)  # fmt: skip


@pytest.mark.parametrize("suffix", SCALES)
@pytest.mark.parametrize("method", [None, "foo", "modelopt", "bitsandbytes"])
def test_a_name_alone_makes_no_scale(tmp_path: Path, suffix: str, method: str | None) -> None:
    """transformers ignores each of these methods, bitsandbytes without a flag among them, and loads what is stored."""
    stored = torch.randn(32, 48, dtype=torch.bfloat16)
    folder = good_folder(tmp_path / "a")
    config = None if method is None else {"quant_method": method}
    found = quantise(folder, stored, torch.full((1,), 0.25), suffix, config)
    assert torch.equal(found.tensor(NAME), stored) and found.shape(NAME) == (32, 48)
    extra = NAME.removesuffix(".weight") + suffix
    assert extra in found.names() and extra in LoadedView.of(found).unexpected


GROUP = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}}


@pytest.mark.parametrize(
    ("suffix", "config", "dtype"),
    [
        (".weight_scale_inv", {"quant_method": "fp8"}, torch.bfloat16),
        (".scale", {"quant_method": "fp8"}, torch.bfloat16),
        (".weight_scale_inv", {"quant_method": "fp8", "modules_to_not_convert": ["down_proj"]}, torch.float8_e4m3fn),
        (".weight_scale_inv", {"quant_method": "fp8", "modules_to_not_convert": ["model.*mlp"]}, torch.float8_e4m3fn),
        (".SCB", {"quant_method": "bitsandbytes", "load_in_8bit": True}, torch.bfloat16),
        (".weight.absmax", {"load_in_4bit": True}, torch.bfloat16),
        (".qweight", {"quant_method": "gptq"}, torch.bfloat16),
        (".weight_packed", {"quant_method": "compressed-tensors", "format": "pack-quantized"}, torch.bfloat16),
        (".weight_scale", {"quant_method": "compressed-tensors", "format": "float-quantized"}, torch.bfloat16),
        (".weight_scale", {"quant_method": "fbgemm_fp8"}, torch.bfloat16),
    ],
)
def test_a_plain_weight_with_parts_of_the_method_is_disputed(
    tmp_path: Path, suffix: str, config: dict[str, Any], dtype: torch.dtype
) -> None:
    found = quantise(good_folder(tmp_path / "a"), torch.ones(32, 48).to(dtype), torch.ones(1), suffix, config)
    with pytest.raises(NotTestable, match="loaders disagree"):
        found.tensor(NAME)
    assert [(one.kind, one.severity) for one in found.findings] == [("disputed weights", "finding")]


@pytest.mark.parametrize(
    "left_out",
    [
        {"config_groups": GROUP, "ignore": ["lm_head", NAME.removesuffix(".weight")]},
        {"config_groups": GROUP, "ignore": ["re:.*down_proj"]},
        {"config_groups": {"group_0": {"targets": ["re:.*q_proj"]}}},
    ],
)
def test_compressed_tensors_leaves_modules_out(tmp_path: Path, left_out: dict[str, Any]) -> None:
    stored = torch.randn(32, 48, dtype=torch.bfloat16)
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", **left_out}
    found = quantise(good_folder(tmp_path / "a"), stored, torch.full((1,), 0.25), ".weight_scale", config)
    assert torch.equal(found.tensor(NAME), stored) and f"{NAME}_scale" in found.names()


def test_a_hanging_pattern_is_refused(tmp_path: Path) -> None:
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["re:(([a-z_.0-9]+)+)+!"]}
    with pytest.raises(InvalidInput, match="modules that quantization_config leaves out"):
        quantise(good_folder(tmp_path / "a"), torch.ones(32, 48), torch.ones(1), ".weight_scale", config)


@pytest.mark.parametrize("stated", [{}, {"bits": 4}, [1], "fp8", {"quant_method": 3}])
def test_a_config_that_transformers_refuses(stated: Any) -> None:
    with pytest.raises(InvalidInput, match="quantization_config"):
        recognise({"quantization_config": stated}, entries("a.weight"))


def test_the_methods_are_those_of_transformers() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    assert {*READ, *OTHERS} - {"bitsandbytes"} == set(AUTO_QUANTIZATION_CONFIG_MAPPING)


def test_the_config_of_the_text_part_counts() -> None:
    config = {"text_config": {"quantization_config": {"quant_method": "fp8"}}}
    found = recognise(config, entries("a.weight", "a.weight_scale_inv", dtype="F8_E4M3"))
    assert found is not None and found.scales == {"a.weight_scale_inv"} and found.exact


def test_plain_weights_are_not_quantised() -> None:
    assert recognise({}, entries("a.weight")) is None
    assert recognise({}, entries("a.weight", "a.weight_scale")) is None


LAYER = "a.weight"


def undone(config: dict[str, Any], stored: torch.Tensor, **parts: torch.Tensor) -> torch.Tensor:
    names = entries(*(f"a.{name}" for name in parts)) | entries(LAYER, dtype=_HEADER.get(stored.dtype, "BF16"))
    found = recognise({"quantization_config": config}, names)
    assert found is not None
    return found.dequantise(LAYER, stored, lambda name: parts[name.removeprefix("a.")])


_HEADER = {torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32"}


def test_scales_in_bytes_are_exponents() -> None:
    stored = torch.ones(2, 2).to(torch.float8_e4m3fn)
    back = undone({"quant_method": "mxfp8"}, stored, weight_scale_inv=torch.full((1, 1), 125, dtype=torch.uint8))
    assert back.tolist() == [[0.25, 0.25], [0.25, 0.25]]


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
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"block_structure": [16, 8]}}},
        },
    ],
)
def test_the_last_block_may_be_cut_where_the_config_tells_its_size(config: dict[str, Any]) -> None:
    stored = torch.ones(17, 20).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 7).view(2, 3)
    suffix = "weight_scale" if config["quant_method"] == "compressed-tensors" else "weight_scale_inv"
    back = undone(config, stored, **{suffix: scale})
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
    four = {"h.0.c_attn.weight", "h.0.c_attn.weight.quant_state.bitsandbytes__nf4"}
    eight = {"h.1.dense.weight", "h.1.dense.SCB"}
    for names, flag in ((four, "load_in_4bit"), (eight, "load_in_8bit")):
        config = {"quantization_config": {"quant_method": "bitsandbytes", flag: True}}
        found = recognise(config, entries(*four, *eight, "norm.weight", dtype="U8"))
        assert found is not None and found.packed == names
