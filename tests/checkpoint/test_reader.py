"""The streaming reader gives what loaders give, tensor by tensor."""

from pathlib import Path
from shutil import copytree

import pytest
import torch
from transformers import AutoModelForCausalLM

from folders import edit_json, good_folder, lora_folder, sharded_folder
from molehunt.checkpoint.reader import Checkpoint, paired_names
from molehunt.errors import InvalidInput, UsageError
from tiny_models import ARCHITECTURES, tiny_model


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


@pytest.mark.parametrize("layout", ["single", "sharded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_is_the_one_that_loads(tmp_path: Path, architecture: str, layout: str) -> None:
    make = good_folder if layout == "single" else sharded_folder
    folder = make(tmp_path / "m", architecture)
    ck = Checkpoint.open(folder)
    state = loaded(folder)
    assert ck.names()
    for name in ck.names():
        there = state[
            next(n for n in (name, f"transformer.{name}", name.replace("embed_out", "lm_head")) if n in state)
        ]
        assert torch.equal(ck.tensor(name), there)
        assert ck.shape(name) == tuple(there.shape)
        assert ck.dtype(name) == there.dtype
    assert len(ck.names()) == len(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_stored_format_is_read_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    model.save_pretrained(tmp_path)
    ck = Checkpoint.open(tmp_path)
    for name, there in loaded(tmp_path).items():
        assert ck.tensor(name).dtype == dtype
        assert torch.equal(ck.tensor(name), there)


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in Checkpoint.open(tmp_path).names()


def test_the_hash_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    a = good_folder(tmp_path / "a")
    before = Checkpoint.open(a).content_hash()
    b = copytree(a, tmp_path / "b")
    assert Checkpoint.open(b).content_hash() == before
    (b / "README.md").write_text("read by nobody")
    assert Checkpoint.open(b).content_hash() == before
    edit_json(b / "generation_config.json", temperature=0.5)
    assert Checkpoint.open(b).content_hash() != before


def test_pairs_are_matched_by_name(tmp_path: Path) -> None:
    a, b = Checkpoint.open(good_folder(tmp_path / "a")), Checkpoint.open(good_folder(tmp_path / "b", "gpt2"))
    both, left, right = paired_names(a, b)
    assert set(both) | set(left) == set(a.names())
    assert set(both) | set(right) == set(b.names())
    assert paired_names(a, a) == (a.names(), (), ())


def test_an_adapter_folder(tmp_path: Path) -> None:
    ck = Checkpoint.open(lora_folder(tmp_path / "l"))
    assert ck.kind == "adapter"
    assert ck.model_type == ""
    assert all(".lora_" in name for name in ck.names())


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="no model folder"):
        Checkpoint.open(tmp_path)
