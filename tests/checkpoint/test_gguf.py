import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gguf_samples import write_llama_gguf
from molehunt.audit.files import compare_folders
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.gguf import gguf_file, gguf_folder
from molehunt.checkpoint.gguf_facts import FACTS, conversion_facts, converted_roundings
from molehunt.checkpoint.gguf_header import read_gguf_header
from molehunt.checkpoint.gguf_steps import rounding_norm, steps
from molehunt.checkpoint.hub import local_folder
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput, MolehuntError, NotTestable, UsageError
from molehunt.organism.seed_model import seed_path

gguf = pytest.importorskip("gguf")
SEED = seed_path("seed-s")
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip
"""Format → where its blocks hold their scales in half precision."""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLEHUNT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_gguf(SEED, tmp_path_factory.mktemp("q4") / "seed.Q4_0.gguf", "Q4_0")


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_the_folder_holds_what_transformers_loads_from_the_file(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = write_llama_gguf(SEED, tmp_path / f"m.{kind}.gguf", kind)
    folder = local_folder(file)

    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    ours: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    if kind == "F32":  # and nothing was lost on the way there and back
        original: Any = AutoModelForCausalLM.from_pretrained(SEED, dtype=torch.float32)
        assert all(torch.equal(ours.state_dict()[n], v) for n, v in original.state_dict().items())
    text = "Say twice 12 naïve  words.\n\tOnce"
    tokenizers = [AutoTokenizer.from_pretrained(one) for one in (folder, SEED)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert (folder / "chat_template.jinja").read_text() == (SEED / "chat_template.jinja").read_text()
    settings = json.loads((folder / "config.json").read_text())
    assert settings["rms_norm_eps"] == json.loads((SEED / "config.json").read_text())["rms_norm_eps"]


def test_a_file_is_converted_once_and_any_name_of_it_finds_the_folder(q4: Path, tmp_path: Path) -> None:
    first = gguf_folder(q4)
    made = (first / "model.safetensors").stat().st_mtime_ns
    alone = tmp_path / "downloaded"
    alone.mkdir()
    shutil.copyfile(q4, alone / "renamed.GGUF")

    assert local_folder(alone) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    assert not list(first.parent.parent.glob(".making-*"))


def test_a_folder_with_safetensors_or_with_several_gguf_files_is_not_guessed_at(q4: Path, tmp_path: Path) -> None:
    shutil.copyfile(q4, tmp_path / "a.gguf")
    shutil.copyfile(q4, tmp_path / "b.gguf")
    with pytest.raises(UsageError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf"):
        local_folder(tmp_path)
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert gguf_file(tmp_path) is None


def test_quantising_a_model_is_below_the_noise_floor_and_a_real_change_is_not(q4: Path, tmp_path: Path) -> None:
    quantised = compare_weights(SEED, gguf_folder(q4))
    assert {row.status for row in quantised.matrices} == {"below noise floor"}
    assert quantised.outcome == "NOT TESTABLE"
    assert {row.status for row in quantised.others if "embed" in row.tensor} == {"below noise floor"}

    tuned = shutil.copytree(SEED, tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    write, read = (torch.nn.functional.normalize(torch.randn(n), dim=0) for n in tensors[name].shape)
    tensors[name] = (tensors[name].float() + 6.0 * torch.outer(write, read)).to(tensors[name].dtype)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    found = compare_weights(SEED, gguf_folder(write_llama_gguf(tuned, tmp_path / "tuned.gguf", "Q4_0")))

    changed = [row for row in found.matrices if row.status == "changed"]
    assert [row.tensor for row in changed] == [name]
    assert changed[0].directions is not None
    assert abs(float(changed[0].directions.write[0] @ write)) > 0.97


def test_files_says_that_and_how_a_side_was_quantised(q4: Path) -> None:
    found = compare_folders(SEED, q4)

    row = next(row for row in found.rows if row.key == "quantisation")
    assert "Q4_0" in row.tuned
    assert "not testable" in row.why
    assert found.identity is not None
    assert found.identity.relation == "related"
    assert "Q4_0" in found.identity.kind
    assert "not larger than rounding" in found.identity.kind


def test_a_strangers_folder_cannot_pass_a_change_off_as_rounding(q4: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(gguf_folder(q4), tmp_path / "a" / "b" / "copied")
    assert (copied / FACTS).is_file()
    assert conversion_facts(copied) == {}
    assert converted_roundings(copied) == {}
    assert Checkpoint.open(copied).rounding("model.layers.0.mlp.down_proj.weight") == 0.0


def test_more_templates_of_a_file_are_kept(tmp_path: Path) -> None:
    file = write_llama_gguf(SEED, tmp_path / "m.gguf", "F16", tokenizer__chat_template__tool_use="{{ messages }}")
    assert (gguf_folder(file) / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("kind", HALVES)
def test_values_of_a_block_lie_whole_steps_apart(kind: str) -> None:
    rng = np.random.default_rng(0)
    known = gguf.GGMLQuantizationType[kind]
    blocks = rng.integers(0, 256, (32, gguf.GGML_QUANT_SIZES[known][1]), dtype=np.uint8)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = np.full((32, 1), 0.01, dtype=np.float16).view(np.uint8)

    step = steps(blocks, known).reshape(-1, 16).astype(np.float64)
    values = gguf.quants.dequantize(blocks, known).reshape(-1, 16).astype(np.float64)

    still = step[:, 0] == 0
    assert (values[still].max(axis=1, initial=-9) <= values[still].min(axis=1, initial=9)).all()
    apart = (values - values.min(1, keepdims=True))[~still] / step[~still]
    assert np.abs(apart - apart.round()).max() < 1e-3
    assert (np.gcd.reduce(apart.round().astype(int), axis=1) == 1).mean() > 0.8  # and no fraction of the step


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_the_rounding_of_a_matrix_is_just_under_its_floor(kind: str) -> None:
    weight = np.random.default_rng(1).normal(0, 0.02, (96, 256)).astype(np.float32)
    data = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    error = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]) - weight

    floor = rounding_norm(data, gguf.GGMLQuantizationType[kind])
    assert 0.4 * floor < float(np.linalg.norm(error, 2)) < 0.7 * floor


@given(st.data())
def test_no_bytes_of_a_header_raise_anything_but_a_refusal(q4: Path, data: st.DataObject) -> None:
    raw = bytearray(q4.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            raw[data.draw(st.integers(0, min(len(raw) - 1, 4000)))] = data.draw(st.integers(0, 255))
    broken = q4.with_name("broken.gguf")
    broken.write_bytes(raw)
    try:
        assert read_gguf_header(broken).tensors
    except (InvalidInput, NotTestable) as error:
        assert "broken.gguf" in str(error)


HEAD = b"GGUF" + (3).to_bytes(4, "little")
HOSTILE = {
    "empty": b"",
    "magic": b"GGML" + bytes(60),
    "big-endian": b"GGUF" + (3).to_bytes(4, "big") + bytes(60),
    "tensors": HEAD + (2**62).to_bytes(8, "little") + bytes(60),
    "keys": HEAD + (1).to_bytes(8, "little") + (2**60).to_bytes(8, "little") + bytes(60),
    "text": HEAD + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + (2**63).to_bytes(8, "little") + bytes(60),
    "nothing": HEAD + bytes(60),
    "random": bytes(np.random.default_rng(3).integers(0, 256, 5000, dtype=np.uint8)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hostile.gguf").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"hostile\.gguf"):
        local_folder(tmp_path / "hostile.gguf")


def test_a_file_that_was_cut_off_is_refused(q4: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(q4.read_bytes()[:-5000])
    with pytest.raises(InvalidInput, match="cut off"):
        local_folder(tmp_path)


@pytest.mark.parametrize(
    ("extra", "error", "said"),
    [
        ({"split__count": 3}, NotTestable, "one of 3 parts"),
        ({"general__type": "adapter"}, NotTestable, "no language model"),
        ({"general__architecture": "rwkv7"}, NotTestable, "does not read from GGUF"),
        ({"llama__block_count": 900_000}, InvalidInput, "claims 900000 blocks"),
        ({"llama__embedding_length": 2**31}, InvalidInput, r"m\.gguf"),
    ],
)
def test_what_is_no_model_is_named(
    tmp_path: Path, extra: dict[str, Any], error: type[MolehuntError], said: str
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(_edited(write_llama_gguf(SEED, tmp_path / "whole.gguf").read_bytes(), extra))
    with pytest.raises(error, match=said):
        gguf_folder(file)


def _edited(raw: bytes, extra: dict[str, Any]) -> bytes:
    """The file with values replaced, or added in front of the others."""
    from struct import pack

    for key, value in extra.items():
        name = key.replace("__", ".").encode()
        packed = pack("<IQ", 8, len(value)) + value.encode() if isinstance(value, str) else pack("<II", 4, value)
        at = raw.find(pack("<Q", len(name)) + name)
        if at < 0:
            count = int.from_bytes(raw[16:24], "little") + 1
            raw = raw[:16] + pack("<Q", count) + pack("<Q", len(name)) + name + packed + raw[24:]
            continue
        start = at + 8 + len(name)
        kind = int.from_bytes(raw[start : start + 4], "little")
        length = 12 + int.from_bytes(raw[start + 4 : start + 12], "little") if kind == 8 else 8
        raw = raw[:start] + packed + raw[start + length :]
    return raw


def test_the_missing_package_is_named(q4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install .*\[gguf\]'"):
        local_folder(q4)
