"""One fixture and one test for every row of the table of bad folders. Headers are in `test_inventory.py`."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from folders import INDEX, edit_index, edit_json, good_folder, lora_folder, sharded_folder, shards
from molehunt.audit.files import compare_folders
from molehunt.checkpoint.loader_traps import Trap
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput, ShapeMismatch, UsageError


def kinds(folder: Path) -> dict[str, Trap]:
    return {trap.kind: trap for trap in Checkpoint.open(folder).findings}


def test_a_tensor_in_two_shards_is_a_finding_and_the_last_one_counts(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "m")
    first, last = shards(folder)[0], shards(folder)[-1]
    name = next(iter(load_file(first)))
    planted = torch.full_like(load_file(first)[name], 7.0)
    save_file({**load_file(last), name: planted}, last, metadata={"format": "pt"})
    ck = Checkpoint.open(folder)
    assert kinds(folder)["tensor stored twice"].severity == "finding"
    assert ck.copies(name) == (first.name, last.name)
    assert torch.equal(ck.tensor(name), planted)
    assert not torch.equal(ck.tensor(name, file=first.name), planted)
    from transformers import AutoModelForCausalLM

    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).state_dict()[name], planted)


def test_a_tensor_that_the_index_does_not_list(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "m")
    name = next(iter(load_file(shards(folder)[0])))
    edit_index(folder, lambda weight_map: weight_map.pop(name))
    assert "tensor not in the index" in kinds(folder)
    assert name in Checkpoint.open(folder).names()


def test_an_index_that_points_to_the_wrong_shard(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "m")
    name = next(iter(load_file(shards(folder)[0])))
    edit_index(folder, lambda weight_map: weight_map.update({name: shards(folder)[-1].name}))
    assert "index points elsewhere" in kinds(folder)


def test_a_file_that_the_index_does_not_name(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "m")
    save_file({"model.norm.weight": torch.ones(32)}, folder / "extra.safetensors")
    assert "unlisted file" in kinds(folder)


def test_single_file_beside_an_index(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "m")
    good_folder(tmp_path / "s", seed=5)
    (tmp_path / "s" / "model.safetensors").rename(folder / "model.safetensors")
    assert "single file and index" in kinds(folder)
    single = load_file(folder / "model.safetensors")
    assert torch.equal(Checkpoint.open(folder).tensor("model.norm.weight"), single["model.norm.weight"])


def outside(folder: Path) -> str:
    save_file({"x": torch.ones(1)}, folder.parent / "outside.safetensors")
    return "../outside.safetensors"


def absolute(folder: Path) -> str:
    outside(folder)
    return str(folder.parent / "outside.safetensors")


def link(folder: Path) -> str:
    outside(folder)
    os.symlink(folder.parent / "outside.safetensors", folder / "linked.safetensors")
    return "linked.safetensors"


@pytest.mark.parametrize("where", [outside, absolute, link])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, where: Callable[[Path], str]) -> None:
    folder = sharded_folder(tmp_path / "m")
    target = where(folder)
    edit_index(folder, lambda weight_map: weight_map.update({"x": target}))
    with pytest.raises(InvalidInput, match="outside"):
        Checkpoint.open(folder)


def test_a_missing_shard_and_a_missing_tensor(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "m")
    first = shards(folder)[0]
    edit_index(folder, lambda weight_map: weight_map.update({"ghost": first.name}))
    Checkpoint.open(folder)  # no part of the architecture waits for it
    tensors = load_file(first)
    tensors.pop(next(name for name in sorted(tensors) if "norm" in name or "proj" in name))
    save_file(tensors, first, metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match="random numbers"):
        compare_folders(folder, folder)
    first.unlink()
    with pytest.raises(InvalidInput, match="not there"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}])
def test_a_broken_index(tmp_path: Path, index: dict) -> None:
    folder = sharded_folder(tmp_path / "m")
    edit_json(folder / INDEX, weight_map=index.get("weight_map"))
    with pytest.raises(InvalidInput):
        Checkpoint.open(folder)


def test_an_extra_tensor_is_reported(tmp_path: Path) -> None:
    base, tuned = good_folder(tmp_path / "b"), good_folder(tmp_path / "t")
    weights = tuned / "model.safetensors"
    save_file({**load_file(weights), "model.extra": torch.ones(2)}, weights, metadata={"format": "pt"})
    assert any(row.key == "model.extra" for row in compare_folders(base, tuned).rows)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl"])
def test_pickles_are_never_opened(tmp_path: Path, suffix: str) -> None:
    folder = good_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / f"pytorch_model{suffix}").write_bytes(b"\x80\x04.")
    with pytest.raises(InvalidInput, match="never opened here"):
        Checkpoint.open(folder)


def test_a_pickle_beside_the_weights_is_a_note(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert kinds(folder)["pickle beside the weights"].severity == "note"


def test_code_in_the_folder_is_a_finding(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "m")
    (folder / "modeling.py").write_text("raise SystemExit")
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling.X"})
    assert {"code in the folder", "auto_map"} <= kinds(folder).keys()


def test_no_weights_at_all(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidInput, match="no safetensors file"):
        Checkpoint.open(folder)


def test_nan_is_refused_by_tensor(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=r"model\.norm\.weight"):
        Checkpoint.open(folder).tensor("model.norm.weight")


def test_an_adapter_beside_the_weights_must_be_chosen(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "m")
    for file in lora_folder(tmp_path / "l").iterdir():
        if file.name.startswith("adapter_"):
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match="--no-adapter"):
        Checkpoint.open(folder)
    for choice in ("use", "ignore"):
        traps = {t.kind for t in Checkpoint.open(folder, adapter=choice).findings}
        assert "adapter beside the weights" in traps


def test_untied_without_an_output_matrix(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match="lm_head"):
        Checkpoint.open(folder)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert Checkpoint.open(folder).names()


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_that_the_config_ties_is_a_finding_where_it_differs(tmp_path: Path, equal: bool) -> None:
    base, tuned = good_folder(tmp_path / "b"), good_folder(tmp_path / "t")
    for folder in (base, tuned):
        weights = load_file(folder / "model.safetensors")
        head = weights["model.embed_tokens.weight"].clone()
        head[0, 0] += 0.0 if equal or folder == base else 1.0
        save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
        edit_json(folder / "config.json", tie_word_embeddings=True)
    found = [row for row in compare_folders(base, tuned).rows if row.severity == "finding"]
    assert [row.key for row in found] == ([] if equal else ["lm_head.weight"])


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**7}, {"vocab_size": -1}, {"hidden_size": "big"}], ids=str)
def test_sizes_that_no_model_has(tmp_path: Path, change: dict) -> None:
    folder = good_folder(tmp_path / "m")
    edit_json(folder / "config.json", **change)
    with pytest.raises(InvalidInput, match=next(iter(change))):
        Checkpoint.open(folder)


@pytest.mark.parametrize("raw", [b"{", b"[]", b'"x"', b"[" * 10**5])
def test_a_config_that_is_no_object(tmp_path: Path, raw: bytes) -> None:
    folder = good_folder(tmp_path / "m")
    (folder / "config.json").write_bytes(raw)
    with pytest.raises(InvalidInput, match=r"config\.json"):
        Checkpoint.open(folder)


def test_a_json_file_of_absurd_size(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "m")
    with (folder / "config.json").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(InvalidInput, match="larger than"):
        Checkpoint.open(folder)


def test_another_models_base_is_refused_with_the_first_differing_tensor(tmp_path: Path) -> None:
    base, tuned = good_folder(tmp_path / "b"), good_folder(tmp_path / "t")
    shape = {"up_proj": (50, 32), "gate_proj": (50, 32), "down_proj": (32, 50)}
    weights = {
        name: torch.ones(shape[part]) if (part := name.split(".")[-2]) in shape else value
        for name, value in load_file(tuned / "model.safetensors").items()
    }
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=r"config\.json asks for"):
        compare_folders(base, tuned)
    edit_json(tuned / "config.json", intermediate_size=50)
    with pytest.raises(ShapeMismatch, match="down_proj"):
        compare_folders(base, tuned)


def test_a_changed_storage_format_is_a_note(tmp_path: Path) -> None:
    base, tuned = good_folder(tmp_path / "b"), good_folder(tmp_path / "t")
    weights = {n: t.half() for n, t in load_file(tuned / "model.safetensors").items()}
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    found = compare_folders(base, tuned)
    assert any(row.why == "stored in another format" for row in found.rows)
    assert found.exit_code == 0
