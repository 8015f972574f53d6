"""Folders that look unlike their base and load like it, and the other way round: what counts is what a loader makes of them."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_folders import adapter_of, tied_base
from folders import INDEX, edit_json, sharded_folder
from molehunt.audit.files import FolderComparison, compare_folders
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.layout import lay_out
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput, NotTestable
from molehunt.model.loading import load_model

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tied_base(tmp_path_factory.mktemp("as-loaded") / "base")


def with_tensors(base: Path, folder: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy of a folder with some tensors set, or removed."""
    made = tied_base(folder)
    stored = load_file(base / "model.safetensors") | {n: t for n, t in tensors.items() if t is not None}
    kept = {n: t.contiguous() for n, t in stored.items() if tensors.get(n, t) is not None}
    save_file(kept, made / "model.safetensors", {"format": "pt"})
    return made


def whys(found: FolderComparison, severity: str) -> str:
    return " | ".join(f"{row.key}: {row.why}" for row in found.rows if row.severity == severity)


def test_a_scale_beside_a_plain_weight_hides_no_change(base: Path, tmp_path: Path) -> None:
    weight = load_file(base / "model.safetensors")[f"{DOWN}.weight"]
    scale = torch.full((len(weight), 1), -0.25)
    tuned = with_tensors(base, tmp_path / "a", **{f"{DOWN}.weight": weight / scale, f"{DOWN}.weight_scale": scale})
    found = compare_folders(base, tuned)
    assert found.identity is not None and found.identity.changed == 1
    assert f"{DOWN}.weight_scale: transformers does not load it" in whys(found, "note")
    rows = compare_weights(base, tuned, k=2).matrices
    assert [row.tensor for row in rows if row.status == "changed"] == [f"{DOWN}.weight"]


def test_packed_numbers_without_a_config_fill_no_parameter(base: Path, tmp_path: Path) -> None:
    packed = torch.ones(6, 32, dtype=torch.int32)
    tuned = with_tensors(base, tmp_path / "a", **{f"{DOWN}.weight": None, f"{DOWN}.qweight": packed})
    for compare in (compare_folders, compare_weights):
        with pytest.raises(
            InvalidInput, match="do not unpack without a quantization_config: loaders fill it with random"
        ):
            compare(base, tuned)


@pytest.mark.parametrize("equal", [True, False])
def test_an_untied_head_is_compared_with_what_the_base_uses(base: Path, tmp_path: Path, equal: bool) -> None:
    head = load_file(base / "model.safetensors")["model.embed_tokens.weight"] * (1 if equal else -1)
    tuned = with_tensors(base, tmp_path / "a", **{"lm_head.weight": head})
    edit_json(tuned / "config.json", tie_word_embeddings=False)
    for one, other in ((base, tuned), (tuned, base)):
        found = compare_folders(one, other)
        assert found.identity is not None and found.identity.changed == (not equal)
        wanted = "with the same values" if equal else "its values changed"
        assert f"lm_head.weight: tied to another parameter on one side only; {wanted}" in whys(found, "note")
        assert (found.identity.relation == "identical") == equal


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_an_index_may_list_what_no_loader_misses(tmp_path: Path, name: str) -> None:
    base, tuned = (tied_base(tmp_path / one) for one in "ab")
    stored = load_file(tuned / "model.safetensors")
    save_file(stored, tuned / "model-1.safetensors", {"format": "pt"})
    (tuned / "model.safetensors").unlink()
    listed = dict.fromkeys([*stored, name], "./model-1.safetensors")
    (tuned / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    found = compare_folders(base, tuned)
    assert found.exit_code == 0 and found.identity is not None and found.identity.relation == "identical"
    assert f"the index lists {name}, which no shard holds" in whys(found, "note")
    load_model(tuned, torch.device("cpu"), None)


def test_an_index_without_a_tensor_that_loaders_need(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "a")
    edit_json(folder / "config.json", num_hidden_layers=4)
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["model.layers.3.mlp.up_proj.weight"] = next(iter(content["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match="random numbers"):
        compare_weights(folder, folder)
    with pytest.raises(InvalidInput, match=r"lists model\.layers\.3\.mlp\.up_proj\.weight, which no shard holds"):
        lay_out(folder, {}).refuse_unheld()


def test_the_last_of_two_spellings_of_a_shard_wins(tmp_path: Path) -> None:
    one = {"a": torch.zeros(2), "b": torch.zeros(2)}
    save_file(one, tmp_path / "1.safetensors", {"format": "pt"})
    save_file({"a": torch.ones(2)}, tmp_path / "2.safetensors", {"format": "pt"})
    weight_map = {"a": "./2.safetensors", "b": "1.safetensors"}  # "./2…" sorts before "1…", and is read before
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert lay_out(tmp_path, {}).files == ("2.safetensors", "1.safetensors")


def test_a_file_name_that_is_no_text_is_a_note(base: Path, tmp_path: Path) -> None:
    tuned = with_tensors(base, tmp_path / "a")
    try:
        (Path(os.fsdecode(os.fsencode(tuned) + b"/\xff.json"))).write_text("{}")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    found = compare_folders(base, tuned)
    assert found.exit_code == 0 and r"\udcff.json" in whys(found, "note")
    found.to_json().encode()
    found.to_table().encode()


@pytest.mark.parametrize(
    "architecture", ["MistralForSequenceClassification", "MistralForRewardModel", "MistralModel", None]
)
def test_a_model_without_a_head_for_words_gives_no_text(base: Path, tmp_path: Path, architecture: str | None) -> None:
    tuned = with_tensors(base, tmp_path / "a", **{"score.weight": torch.ones(1, 32)})
    edit_json(tuned / "config.json", tie_word_embeddings=False, architectures=architecture and [architecture])
    with pytest.raises(NotTestable, match="gives no text"):
        compare_weights(base, tuned)
    with pytest.raises(NotTestable, match="gives no text"):
        load_model(tuned, torch.device("cpu"), None)
    assert "gives no text" in whys(compare_folders(base, tuned), "finding")  # the base does
    assert "compared by stored names alone" in whys(compare_folders(tuned, tuned), "note")


def test_a_model_of_text_without_its_head_is_broken(base: Path, tmp_path: Path) -> None:
    tuned = with_tensors(base, tmp_path / "a")
    edit_json(tuned / "config.json", tie_word_embeddings=False)
    with pytest.raises(InvalidInput, match="random numbers"):
        Checkpoint.open(tuned)


@pytest.mark.parametrize("settings", [{"lora_alpha": 1e300}, {"alpha_pattern": {"down_proj": 1e30}}])
def test_a_scale_that_overflows_is_not_testable(base: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    adapter = adapter_of(base, tmp_path / "a", "LORA", r=3)
    edit_json(adapter / "adapter_config.json", **settings)
    with pytest.raises(NotTestable, match="its scale overflows"):
        compare_weights(base, adapter)
    assert "scale overflows" in whys(compare_folders(base, adapter), "finding")


def test_an_adapter_of_no_known_type_is_a_finding(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "a", "LORA", r=3)
    edit_json(adapter / "adapter_config.json", peft_type="FOO")
    assert "does not know" in whys(compare_folders(base, adapter), "finding")


def test_a_saved_embedding_that_peft_refuses_is_a_finding(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "a", "LORA", r=3)
    file, shape = (
        adapter / "adapter_model.safetensors",
        load_file(base / "model.safetensors")["model.embed_tokens.weight"].shape,
    )
    grown = torch.ones(shape[0] + 2, shape[1])
    save_file(load_file(file) | {"base_model.model.model.embed_tokens.weight": grown}, file)
    assert "PEFT refuses it unless" in whys(compare_folders(base, adapter), "finding")


@pytest.mark.parametrize("factor", [1e15, 1e25])
def test_no_number_in_json_is_infinite(base: Path, tmp_path: Path, factor: float) -> None:
    weights = load_file(base / "model.safetensors")
    tuned = with_tensors(
        base, tmp_path / "a", **{"model.norm.weight": weights["model.norm.weight"].double() * factor**10}
    )
    found = compare_weights(base, tuned)
    json.loads(found.to_json())
    assert all(row.status != "changed" or row.rel_norm is not None for row in found.others)


def test_a_body_without_its_head_is_a_finding(tmp_path: Path) -> None:
    from zoo import zoo_model

    model = zoo_model("qwen2", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    model.model.save_pretrained(tmp_path / "tuned")
    found = compare_folders(tmp_path / "base", tmp_path / "tuned")
    assert found.exit_code == 1
    assert any("gives no text" in row.why for row in found.rows if row.severity == "finding")


def test_an_encoder_decoder_under_other_names_is_a_finding(tmp_path: Path) -> None:
    from zoo import zoo_model

    for side in ("base", "tuned"):
        zoo_model("t5").save_pretrained(tmp_path / side)
    file = tmp_path / "tuned" / "model.safetensors"
    save_file({f"_orig_mod.{name}": value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    found = compare_folders(tmp_path / "base", tmp_path / "tuned")
    assert any(row.key == "names" and row.severity == "finding" for row in found.rows)
    assert compare_folders(tmp_path / "base", tmp_path / "base").exit_code == 0


def test_a_bias_that_was_rounded_to_fp16_changed_by_rounding_alone() -> None:
    from molehunt.checkpoint.noise_floor import within_rounding

    before = torch.tensor([3e-6, -2e-7, 0.5, 0.0, 1e-3])
    after = before.to(torch.float16)
    assert within_rounding(before, torch.float32, after, torch.float16)
    moved = after.clone()
    moved[2] += 0.01
    assert not within_rounding(before, torch.float32, moved, torch.float16)
