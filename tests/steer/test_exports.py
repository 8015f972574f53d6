"""Steering vectors in the formats of other programs, checked with those programs' own code."""

import json
import logging
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.errors import InvalidInput, UsageError
from molehunt.model.pair import ModelPair
from molehunt.steer.capability_lm_eval import capability
from molehunt.steer.export_gguf import read_gguf, write_gguf
from molehunt.steer.export_lm_eval import hook_points, write_lm_eval
from molehunt.steer.vector import SteeringVector, VectorFacts
from molehunt.workflows.steer_tasks import task_capability
from tiny_models import ARCHITECTURES, D_MODEL, save, tiny_model, tiny_tokenizer, with_lora

FACTS = VectorFacts(method="by hand", n_layers=3, d_model=D_MODEL)
IDS = torch.tensor([[5, 9, 33, 70, 12, 8, 51], [20, 21, 22, 90, 3, 4, 44]])


def drawn(*layers: int, scale: float = 4.0) -> SteeringVector:
    rng = torch.Generator().manual_seed(sum(layers))
    return SteeringVector({layer: scale * torch.randn(D_MODEL, generator=rng) for layer in layers}, FACTS)


def control_vector(
    path: Path,
    tensors: dict[str, torch.Tensor],
    *,
    architecture: str = "controlvector",
    fields: tuple[bytes, ...] = (),
    **header: Any,
) -> Path:
    """A GGUF file by hand, right or wrong: `version`, `kind`, `dims`, `offset`, `infos` and `pairs` can lie."""
    text = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()  # noqa: E731
    pairs = [text("general.architecture") + struct.pack("<I", 8) + text(architecture), *fields]
    infos, data = b"", b""
    for name, value in tensors.items():
        dims = header.get("dims", value.shape)
        infos += text(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in dims)
        infos += struct.pack("<IQ", header.get("kind", 0), len(data) + header.get("offset", 0))
        data += value.numpy().tobytes() + b"\0" * (-value.numel() * 4 % 32)
    counts = header.get("infos", len(tensors)), header.get("pairs", len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", header.get("version", 3), *counts) + b"".join(pairs) + infos
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def test_the_gguf_package_reads_what_was_written(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    vector = drawn(1, 2)
    exported = write_gguf(vector, tmp_path / "v.gguf", model_hint="llama")
    assert (exported.path, exported.blocks, exported.left_out) == (tmp_path / "v.gguf", (1, 2), ())
    reader = gguf.GGUFReader(exported.path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert (fields["controlvector.model_hint"], fields["controlvector.layer_count"]) == ("llama", 2)
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
    for tensor in reader.tensors:
        layer = int(tensor.name.removeprefix("direction."))
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and list(tensor.shape) == [D_MODEL]
        assert torch.equal(torch.from_numpy(tensor.data.copy()), vector.vectors[layer])
    again = read_gguf(exported.path, n_layers=3)
    assert again.facts == VectorFacts(method="control vector for llama", n_layers=3, d_model=D_MODEL)
    assert {*again.vectors} == {1, 2} and all(again.vectors[i].equal(vector.vectors[i]) for i in (1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


def test_block_0_is_left_out_and_alone_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("gguf")
    with caplog.at_level(logging.WARNING):
        exported = write_gguf(drawn(0, 2), tmp_path / "v.gguf", model_hint="llama")
    assert (exported.blocks, exported.left_out) == ((2,), (0,)) and "block 0" in caplog.text
    assert {*read_gguf(exported.path, n_layers=3).vectors} == {2}
    with pytest.raises(UsageError, match="block 0 alone"):
        write_gguf(drawn(0), tmp_path / "w.gguf", model_hint="llama")
    assert not (tmp_path / "w.gguf").exists()


def test_a_file_as_repeng_writes_it_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "r.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 2)
    writer.add_array("more.words", ["a", "bc"])
    writer.add_array("more.numbers", [1, 2, 3])
    writer.add_float32("more.float", 0.5)
    writer.add_custom_alignment(64)
    rows = {layer: torch.randn(7) for layer in (2, 1)}
    for layer, row in rows.items():
        writer.add_tensor(f"direction.{layer}", row.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    vector = read_gguf(tmp_path / "r.gguf", n_layers=32)
    assert vector.facts == VectorFacts(method="control vector for mistral", n_layers=32, d_model=7)
    assert all(vector.vectors[layer].equal(row) for layer, row in rows.items())
    with pytest.raises(UsageError, match="acts on block 2; a model of 2 blocks has 0 to 1"):
        read_gguf(tmp_path / "r.gguf", n_layers=2)


ROW = torch.arange(8.0)


@pytest.mark.parametrize(
    ("tensors", "header", "says"),
    [
        ({"direction.0": ROW}, {}, "direction.0 is no direction of a block from 1 on"),
        ({"direction.01": ROW}, {}, "direction.01 is no direction"),
        ({"direction.-1": ROW}, {}, "is no direction"),
        ({"blk.1.attn_q.weight": ROW}, {}, "is no direction"),
        ({"direction.1\x1b[31m": ROW}, {}, r"direction.1\\x1b\[31m"),
        ({}, {}, "it holds no direction"),
        ({"direction.1": ROW, "direction.2": ROW[:4]}, {}, "different widths"),
        ({"direction.1": ROW}, {"architecture": "llama"}, "its architecture is 'llama'"),
        ({"direction.1": ROW}, {"kind": 1}, "no row of fp32"),
        ({"direction.1": ROW}, {"dims": (4, 2)}, "no row of fp32"),
        ({"direction.1": ROW}, {"dims": (0,)}, "no row of fp32"),
        ({"direction.1": ROW}, {"dims": (1,) * 9}, "9 dimensions"),
        ({"direction.1": ROW}, {"dims": (2**63,)}, "past the end"),
        ({"direction.1": ROW}, {"offset": 2**63}, "past the end"),
        ({"direction.1": ROW}, {"version": 1}, "version 1"),
        ({"direction.1": ROW}, {"version": 3 << 24}, "version 50331648"),
        ({"direction.1": ROW}, {"infos": 2**63}, "no control vector"),
        ({"direction.1": ROW}, {"pairs": 2**63}, "no control vector"),
        ({"direction.1": ROW * torch.nan}, {}, "no number"),
        ({"direction.1": ROW}, {"fields": (struct.pack("<Q", 2**60) + b"x",)}, "cut off"),
        ({"direction.1": ROW}, {"fields": (b"\x01\0\0\0\0\0\0\0k\x63\0\0\0",)}, "type 99"),
        ({"direction.1": ROW}, {"fields": (b"\x01\0\0\0\0\0\0\0k\x09\0\0\0\x09\0\0\0" + b"\xff" * 8,)}, "type 9"),
        ({"direction.1": ROW}, {"fields": (b"\x01\0\0\0\0\0\0\0k\x09\0\0\0\x08\0\0\0" + b"\xff" * 8,)}, "cut off"),
        ({"direction.1": ROW}, {"fields": (b"\x01\0\0\0\0\0\0\0k\x09\0\0\0\x00\0\0\0" + b"\xff" * 8,)}, "cut off"),
        ({"direction.1": ROW}, {"fields": (b"\x01\0\0\0\0\0\0\0k\0\0\0\0\0",) * 2}, "'k' twice"),
        ({"direction.1": ROW}, {"fields": (b"\x01\0\0\0\0\0\0\0\xff\0\0\0\0\0",)}, "decode"),
        ({"direction.1": ROW}, {"fields": (b"\x11\0\0\0\0\0\0\0general.alignment\x04\0\0\0\x03\0\0\0",)}, "power of two"),
        ({"direction.1": ROW}, {"fields": (b"\x11\0\0\0\0\0\0\0general.alignment\x04\0\0\0\0\0\0\0",)}, "power of two"),
    ],
)  # fmt: skip
def test_a_hostile_control_vector_is_refused(tmp_path: Path, tensors: Any, header: Any, says: str) -> None:
    assert read_gguf(control_vector(tmp_path / "good.gguf", {"direction.1": ROW}), n_layers=3).vectors[1].equal(ROW)
    with pytest.raises(InvalidInput, match=says):
        read_gguf(control_vector(tmp_path / "bad.gguf", tensors, **header), n_layers=3)


def test_no_file_a_folder_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "huge.gguf").open("wb") as file:
        file.truncate(300 * 2**20)  # sparse
    for path, says in ((tmp_path / "none.gguf", "No such file"), (tmp_path, "directory"), (file.name, "256 MB")):
        with pytest.raises(InvalidInput, match=says):
            read_gguf(Path(path), n_layers=3)


@given(at=st.integers(0, 200), byte=st.integers(0, 255), cut=st.integers(0, 200))
def test_whatever_the_bytes_nothing_but_our_errors_comes(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    raw = bytearray(control_vector(folder / "good.gguf", {"direction.1": ROW, "direction.2": ROW}).read_bytes())
    raw[at] = byte
    (folder / "bad.gguf").write_bytes(raw[: len(raw) - cut])
    try:
        found = read_gguf(folder / "bad.gguf", n_layers=3)
    except (InvalidInput, UsageError):
        return
    assert {*found.vectors} <= {1, 2} and found.facts.d_model in range(1, 17)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install .*\[exports\]"):
        write_gguf(drawn(1), tmp_path / "v.gguf", model_hint="llama")
    pair = ModelPair(tiny_model("llama"), tiny_model("llama", 1), tiny_tokenizer())
    with pytest.raises(UsageError, match=r"pip install .*\[exports\]"):
        capability(pair, ["arc_easy"], drawn(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hook_points_are_the_blocks_under_the_base_model(architecture: str) -> None:
    stem = "h" if architecture == "gpt2" else "layers"
    assert hook_points(tiny_model(architecture)) == [f"{stem}.{i}" for i in range(3)]
    assert hook_points(with_lora(tiny_model(architecture), architecture)) == [f"{stem}.{i}" for i in range(3)]


def test_the_lm_eval_file_holds_plain_tensors(tmp_path: Path) -> None:
    vector = drawn(0, 2)
    path = write_lm_eval(vector, tiny_model("llama"), tmp_path / "v.pt", strength=-0.5)
    config = torch.load(path, weights_only=True)
    assert {*config} == {"layers.0", "layers.2"}
    assert config["layers.2"]["steering_vector"].equal(vector.vectors[2])
    rest = {"steering_coefficient": -0.5, "action": "add", "bias": None, "head_index": None}
    assert {k: v for k, v in config["layers.2"].items() if k != "steering_vector"} == rest
    clamp = torch.load(write_lm_eval(vector, tiny_model("llama"), path, operator="ablate"), weights_only=True)
    assert clamp["layers.0"]["action"] == "clamp" and clamp["layers.0"]["steering_coefficient"] == 0.0


def test_what_lm_eval_cannot_do_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match=r"must end in \.pt"):
        write_lm_eval(drawn(1), model, tmp_path / "v.csv")
    with pytest.raises(UsageError, match="cannot clip"):
        write_lm_eval(drawn(1), model, tmp_path / "v.pt", operator="clip")
    with pytest.raises(UsageError, match=r"not 0.5 of it"):
        write_lm_eval(drawn(1), model, tmp_path / "v.pt", strength=0.5, operator="ablate")
    with pytest.raises(UsageError, match="of 3 blocks; this one has 2"):
        write_lm_eval(drawn(1), tiny_model("llama", n_layers=2), tmp_path / "v.pt")
    with pytest.raises(UsageError, match="block 1 is zero"):
        write_lm_eval(0 * drawn(1), model, tmp_path / "v.pt", operator="ablate")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("operator", "strength"), [("add", 1.5), ("add", -2.0), ("ablate", 1.0)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_lm_eval_steers_as_we_do(tmp_path: Path, architecture: str, operator: Any, strength: float) -> None:
    steered = pytest.importorskip("lm_eval.models.hf_steered")
    model, vector = tiny_model(architecture), drawn(0, 2)
    folder = save(model, tmp_path / "model")
    path = write_lm_eval(vector, model, tmp_path / "v.pt", strength=strength, operator=operator)
    theirs = steered.SteeredModel(pretrained=str(folder), steer_path=str(path), device="cpu", dtype="float32")
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        with vector.applied(model, strength, operator=operator):
            ours = model(input_ids=IDS).logits
    got = theirs._model_call(IDS)
    assert (ours - plain).abs().max() > 0.1
    if operator == "add":
        assert torch.equal(got, ours)
    else:  # ours projects with one matrix product, theirs with a sum
        assert torch.allclose(got, ours, atol=1e-4)


def task_folder(folder: Path) -> Path:
    """A task of 24 questions with two answers, of which the first is right."""
    folder.mkdir()
    rows = [{"question": f"q{i} {chr(97 + i)}", "choices": ["aa", "bb"], "answer": i % 2} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(
        "task: molehunt_tiny\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(folder / 'rows.jsonl'))}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return folder


@pytest.mark.filterwarnings("default")  # of lm_eval and datasets
def test_capability_on_a_local_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = task_folder(tmp_path / "tasks")
    base, tuned = tiny_model("llama"), tiny_model("llama", 1)
    pair = ModelPair(base, tuned, tiny_tokenizer())
    vector = drawn(0, 1)
    same = capability(pair, ["molehunt_tiny"], vector, 0.0, include=tasks)
    assert [(one.task, one.metric, one.rows) for one in same] == [
        ("molehunt_tiny", "acc,none", 24),
        ("molehunt_tiny", "acc_norm,none", 24),
    ]
    for one in same:
        assert one.plain == one.steered and one.paired is not None and one.paired.difference.estimate == 0
        error = (one.plain * (1 - one.plain) / 23) ** 0.5
        assert one.stderr == pytest.approx((error, error))
    moved, limited = (capability(pair, ["molehunt_tiny"], vector, 4.0, include=tasks, limit=n)[0] for n in (None, 6))
    assert moved.plain == same[0].plain and limited.rows == 6
    assert moved.steered != moved.plain and moved.paired is not None
    assert moved.paired.difference.estimate == pytest.approx((moved.steered - moved.plain) * 24 / 26, abs=1e-6)
    wide = {0: (-1e9, 1e9), 1: (-1e9, 1e9)}
    clipped = capability(pair, ["molehunt_tiny"], vector, operator="clip", ranges=wide, include=tasks)[0]
    assert clipped.steered == clipped.plain
    result = task_capability(pair, vector=vector, tasks=["molehunt_tiny"], strength=4.0, include=tasks)
    assert result.tasks[0] == moved and "molehunt_tiny" in result.summary()
    with pytest.raises(UsageError, match="no task nonsense"):
        capability(pair, ["nonsense"], vector, include=tasks)
