"""Packed layouts: every folder is compared, LoRA needs no base weights, and values are given back where a library agrees."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from folders import edit_json, good_folder, lora_folder
from molehunt.audit.files import compare_folders
from molehunt.audit.weight_comparison import TensorRow
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.packed_weights import FP4, unpacked
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput, NotTestable
from molehunt.model.loading import load_model

DOWN = "model.layers.0.mlp.down_proj.weight"
Pack = Callable[[str, Tensor], dict[str, Tensor]]


def packed_folder(path: Path, pack: Pack, quantization: dict[str, Any], *, seed: int = 0) -> Path:
    """A tiny llama, the matrices of whose blocks are stored as `pack` makes them."""
    folder = good_folder(path, seed=seed)
    stored: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        stored |= pack(name.removesuffix(".weight"), value) if name.endswith("proj.weight") else {name: value}
    save_file(
        {name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    edit_json(folder / "config.json", quantization_config=quantization)
    return folder


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes as int32 words, one bit after the other, lowest first. Slow, and written for being read."""
    rows: list[list[int]] = []
    for row in codes.tolist():
        long = sum(code << (i * bits) for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([((long >> (32 * i)) & 0xFFFFFFFF) for i in range(count)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def _gptq(module: str, value: Tensor) -> dict[str, Tensor]:
    rows, columns = value.shape
    return {
        f"{module}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        f"{module}.qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
        f"{module}.scales": torch.ones(1, rows, dtype=torch.float16),
        f"{module}.g_idx": torch.zeros(columns, dtype=torch.int32),
    }


def _awq(module: str, value: Tensor) -> dict[str, Tensor]:
    rows, columns = value.shape
    return {
        f"{module}.qweight": torch.zeros(columns, rows // 8, dtype=torch.int32),
        f"{module}.qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
        f"{module}.scales": torch.ones(1, rows, dtype=torch.float16),
    }


def _bitsandbytes(module: str, value: Tensor) -> dict[str, Tensor]:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(value.shape)}
    return {
        f"{module}.weight": torch.zeros(value.numel() // 2, 1, dtype=torch.uint8),
        f"{module}.weight.absmax": torch.zeros(value.numel() // 64, dtype=torch.uint8),
        f"{module}.weight.quant_map": torch.zeros(16),
        f"{module}.weight.nested_absmax": torch.zeros(1),
        f"{module}.weight.nested_quant_map": torch.zeros(256),
        f"{module}.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip


def _without_state(module: str, value: Tensor) -> dict[str, Tensor]:
    made = _bitsandbytes(module, value)
    made[f"{module}.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)
    return made


def _eight_bit(module: str, value: Tensor) -> dict[str, Tensor]:
    return {
        f"{module}.weight": torch.zeros(value.shape, dtype=torch.int8),
        f"{module}.SCB": torch.ones(len(value)),
        f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _nvfp4(module: str, value: Tensor) -> dict[str, Tensor]:
    rows, columns = value.shape
    return {
        f"{module}.weight_packed": torch.zeros(rows, columns // 2, dtype=torch.uint8),
        f"{module}.weight_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
        f"{module}.weight_global_scale": torch.ones(1),
    }


def _hqq(module: str, value: Tensor) -> dict[str, Tensor]:
    return {f"{module}.W_q": torch.zeros(value.numel() // 2, dtype=torch.uint8), f"{module}.meta": torch.ones(4)}


COMPRESSED = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}}
LAYOUTS: dict[str, tuple[Pack, dict[str, Any]]] = {
    "gptq": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": 128}),
    "bitsandbytes 4 bit": (_bitsandbytes, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes without a state": (_without_state, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes 8 bit": (_eight_bit, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "nvfp4": (_nvfp4, COMPRESSED),
    "a layout that nobody knows": (_hqq, {"quant_method": "hqq"}),
}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, TensorRow]]:
    """An adapter, and the rows of what it changes in a plain base."""
    folder = lora_folder(tmp_path_factory.mktemp("lora") / "lora", target_modules=["q_proj", "down_proj"])
    found = compare_weights(good_folder(folder.parent / "plain"), folder, k=2)
    return folder, {row.tensor: row for row in found.matrices if row.status == "changed"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_directions_of_lora_need_no_base_weights(
    tmp_path: Path, layout: str, lora: tuple[Path, dict[str, TensorRow]]
) -> None:
    base = packed_folder(tmp_path / "base", *LAYOUTS[layout])
    folder, wanted = lora
    found = compare_weights(base, folder, k=2)
    rows = {row.tensor: row for row in found.matrices if row.status == "changed"}
    assert len(wanted) == 6 and rows.keys() == wanted.keys()
    assert all(rows[name].strengths == wanted[name].strengths for name in rows)
    assert all(row.rel_norm is None and "unknown" in row.why for row in rows.values())
    assert "0.0e+00" not in found.to_table()
    assert compare_folders(base, folder).exit_code in (0, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_fine_tune_is_compared_as_far_as_it_goes(tmp_path: Path, layout: str) -> None:
    base, tuned = packed_folder(tmp_path / "base", *LAYOUTS[layout]), good_folder(tmp_path / "tuned", seed=0)
    files = compare_folders(base, tuned)
    assert "cannot be undone exactly: weights NOT TESTABLE" in files.to_json()
    assert "another model's base" not in files.to_table()
    try:
        rows = {row.tensor: row for row in compare_weights(base, tuned, k=2).matrices}
    except NotTestable as error:
        assert "hqq" in str(error)
        return
    assert rows[DOWN].status == "not testable"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_is_identical_and_one_other_bit_is_not_testable(tmp_path: Path, layout: str) -> None:
    """Nobody can say how a weight changed whose packed numbers differ, and it is not counted as changed or unchanged."""
    base = packed_folder(tmp_path / "base", *LAYOUTS[layout])
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    same = compare_folders(base, copy)
    assert (same.verdict, same.exit_code) == ("NO FINDING", 0)
    assert same.identity is not None and same.identity.relation == "identical"
    stored = load_file(copy / "model.safetensors")
    module = DOWN.removesuffix("weight")
    own = (f"{module}meta", f"{module}weight.quant_state.bitsandbytes__nf4")  # a tensor of its own; JSON, no number
    for part in (name for name in stored if name.startswith(module) and name not in own):
        shutil.rmtree(copy)
        shutil.copytree(base, copy)
        other = stored[part].clone()
        torch.atleast_1d(other).view(torch.uint8).flatten()[0] ^= 1
        save_file({**stored, part: other}, copy / "model.safetensors", {"format": "pt"})
        found = compare_folders(base, copy)
        assert (found.verdict, found.exit_code) == ("NOT TESTABLE", 3), part
        assert found.identity is not None and (found.identity.unread, found.identity.changed) == (1, 0), part
        assert "1 tensor cannot be compared" in found.to_table()


def _pack_quantized(bits: int, group: int, *, zeros: bool = False, order: bool = False) -> tuple[Pack, dict[str, Any]]:
    def pack(module: str, value: Tensor) -> dict[str, Tensor]:
        rows, columns = value.shape
        groups = columns // group if group else 1
        index = torch.arange(columns) // (columns // groups)
        if order:
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
        low = -(2 ** (bits - 1))
        largest = torch.zeros(rows, groups).scatter_reduce(1, index.expand(rows, -1), value.abs(), "amax")
        scale = largest / (2 ** (bits - 1) - 1)
        offset = torch.full((rows, groups), 1 if zeros else 0)
        codes = (value / scale[:, index]).round().long() + offset[:, index]
        codes = codes.clamp(low, -low - 1)
        made = {
            f"{module}.weight_packed": words(codes - low, bits),
            f"{module}.weight_scale": scale,
            f"{module}.weight_shape": torch.tensor([rows, columns]),
        }
        if zeros:
            made[f"{module}.weight_zero_point"] = words((offset - low).mT, bits).mT
        if order:
            made[f"{module}.weight_g_idx"] = index.to(torch.int32)
        return made

    weights = {"num_bits": bits, "type": "int", "symmetric": not zeros, "strategy": "group" if group else "channel"}
    config = {"group_0": {"targets": ["Linear"], "weights": {**weights, "group_size": group or None}}}
    return pack, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": config}


@pytest.mark.parametrize(
    ("bits", "group", "zeros", "order"),
    [(4, 16, False, False), (8, 0, False, False), (4, 16, True, False), (4, 8, False, True), (3, 16, False, False)],
)
def test_integers_of_compressed_tensors_are_given_back(
    tmp_path: Path, bits: int, group: int, zeros: bool, order: bool
) -> None:
    plain = Checkpoint.open(good_folder(tmp_path / "plain"))
    packed = Checkpoint.open(
        packed_folder(tmp_path / "packed", *_pack_quantized(bits, group, zeros=zeros, order=order))
    )
    assert packed.names() == plain.names()
    for name in (DOWN, "model.layers.1.self_attn.k_proj.weight"):
        value, wanted = packed.tensor(name), plain.tensor(name)
        assert value.shape == wanted.shape == packed.shape(name)
        step = wanted.abs().amax() / (2 ** (bits - 1) - 1)
        assert float((value - wanted).abs().max()) <= float(step) * (1.01 if zeros else 0.51)


def test_rounding_to_few_bits_is_no_change(tmp_path: Path) -> None:
    plain = good_folder(tmp_path / "plain")
    found = compare_weights(
        plain, packed_folder(tmp_path / "packed", *_pack_quantized(4, 16)), k=4, roles=("o", "down")
    )
    rows = [row for row in found.matrices if row.role is not None]
    assert rows and all(row.status == "below noise floor" for row in rows), [(r.tensor, r.status, r.z) for r in rows]


def test_parts_that_do_not_fit_are_not_testable(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path / "packed", *_pack_quantized(4, 16, order=True))
    stored = load_file(folder / "model.safetensors")
    stored[DOWN.replace("weight", "weight_g_idx")] += 100
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotTestable, match="does not fit its weight"):
        Checkpoint.open(folder).tensor(DOWN)


@given(bits=st.integers(1, 8), codes=st.lists(st.integers(0, 2**8 - 1), min_size=1, max_size=70))
def test_words_are_unpacked(bits: int, codes: list[int]) -> None:
    wanted = torch.tensor([codes, codes[::-1]]) % 2**bits
    assert torch.equal(unpacked(words(wanted, bits), bits, len(codes)).long(), wanted - 2 ** (bits - 1))


def test_experts_in_mxfp4_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    import transformers as hf

    config = hf.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(0)
    cast("Any", hf.GptOssForCausalLM(config)).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for part, rows, inputs in (("gate_up_proj", 128, 32), ("down_proj", 32, 64)):
        name = f"model.layers.0.mlp.experts.{part}"
        assert stored.pop(name).shape == (2, inputs, rows)
        stored[f"{name}_blocks"] = torch.randint(0, 256, (2, rows, inputs // 32, 16), dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(118, 124, (2, rows, inputs // 32), dtype=torch.uint8)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "mxfp4"})
    model = load_model(tmp_path, torch.device("cpu"), torch.float32)  # which compares every parameter
    name = "model.layers.0.mlp.experts.down_proj"
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(model.state_dict()[name].float(), checkpoint.tensor(name))
    assert checkpoint.shape(name) == (2, 64, 32)
    low, high = (FP4[int(stored[f"{name}_blocks"][1, 5, 1, 3]) >> shift & 15] for shift in (0, 4))
    scale = 2.0 ** (int(stored[f"{name}_scales"][1, 5, 1]) - 127)
    assert checkpoint.tensor(name)[1, 38:40, 5].tolist() == [low * scale, high * scale]


@pytest.mark.parametrize("edge", [10**6, 10**9, 10**12])
def test_blocks_that_no_model_has_are_refused_before_anything_is_allocated(tmp_path: Path, edge: int) -> None:
    folder = good_folder(tmp_path / "base")
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [edge, 64]})
    with pytest.raises(InvalidInput, match="edges of up to 65536 are believed"):
        Checkpoint.open(folder)


def test_a_block_may_be_larger_than_its_matrix(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "base")
    stored = load_file(folder / "model.safetensors")
    stored[DOWN] = stored[DOWN].to(torch.float8_e4m3fn)
    stored[f"{DOWN}_scale_inv"] = torch.full((1, 1), 0.5)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [65536, 65536]})
    assert torch.equal(Checkpoint.open(folder).tensor(DOWN), stored[DOWN].float() * 0.5)
