"""The view of a folder as it is loaded, against transformers' own loading."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from molehunt.checkpoint.loaded_view import LoadedView, loaded_views
from molehunt.checkpoint.reader import Checkpoint
from molehunt.checkpoint.skeleton import skeleton
from molehunt.errors import InvalidInput, NotTestable
from zoo import OPTIONS, zoo_model


def view_of(folder):
    return LoadedView.of(Checkpoint.open(folder))


def edited(folder, target, change):
    """A copy of a folder with other tensors."""
    shutil.copytree(folder, target)
    save_file(change(load_file(target / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


def configured(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    zoo_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "published"),
    [
        *((name, True) for name in OPTIONS),
        *((name, False) for name in ("qwen3_moe", "mixtral", "jamba", "gemma3_with_vision")),
    ],
)
def test_every_parameter_is_the_one_that_transformers_loads(name, published, tmp_path):
    """Stored as published, and as transformers itself holds it."""
    zoo_model(name).save_pretrained(tmp_path, save_original_format=published)
    view = view_of(tmp_path)
    model, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded = model.state_dict()
    assert set(view.names()) | set(view.tied) == set(loaded)
    assert set(view.missing) == set(info["missing_keys"]) == set()
    assert not view.doubled
    for key in view.names():
        assert view.shape(key) == tuple(loaded[key].shape)
        assert torch.equal(view.tensor(key), loaded[key]), key


def test_what_transformers_misses_or_ignores_is_missing_or_ignored_here(llama, tmp_path):
    def change(tensors):
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        return tensors

    view = view_of(edited(llama, tmp_path / "m", change))
    _, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert list(view.missing) == sorted(info["missing_keys"]) == ["model.layers.1.mlp.up_proj.weight"]
    assert list(view.unexpected) == sorted(info["unexpected_keys"]) == ["model.layers.7.mlp.up_proj.weight"]
    with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.up_proj.*layers\.7"):
        view.must_be_complete()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "student."])
def test_weights_under_a_wrappers_prefix_are_missing_not_unchanged(prefix, llama, tmp_path):
    folder = edited(llama, tmp_path / "m", lambda tensors: {prefix + name: value for name, value in tensors.items()})
    _, info = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert list(view_of(folder).missing) == sorted(info["missing_keys"]) != []


def test_of_two_tensors_for_one_parameter_the_same_one_is_taken_as_by_transformers(llama, tmp_path):
    def change(tensors):
        return tensors | {name.removeprefix("model."): value + 1 for name, value in tensors.items() if "model." in name}

    folder = edited(llama, tmp_path / "m", change)
    view = view_of(folder)
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert len(view.doubled) > 20
    assert all(torch.equal(view.tensor(name), loaded[name]) for name in view.names())
    assert len(view.unread) == len(view.doubled)  # the first of each two in natural order is taken
    assert {"model.layers.0.mlp.up_proj.weight", "norm.weight"} <= set(view.unread)


@pytest.mark.parametrize("stored", ["the embedding", "the unembedding", "both, equal", "both, different"])
def test_ties_follow_what_is_stored(stored, llama, tmp_path):
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"

    def change(tensors):
        tensors[head] = tensors[embedding] + (stored == "both, different")
        if stored == "the embedding":
            del tensors[head]
        if stored == "the unembedding":
            del tensors[embedding]
        return tensors

    folder = configured(edited(llama, tmp_path / "m", change), tie_word_embeddings=True)
    view = view_of(folder)
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name in (head, embedding):
        assert torch.equal(view.tensor(view.tied.get(name, name)), loaded[name])
    assert not view.missing
    assert view.apart == (((head, embedding),) if stored.startswith("both") else ())


def test_a_shape_that_the_config_does_not_ask_for_is_refused(llama, tmp_path):
    folder = configured(edited(llama, tmp_path / "m", dict), intermediate_size=40)
    with pytest.raises(InvalidInput, match=r"config\.json asks for"):
        view_of(folder).must_be_complete()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (hf.T5Config(d_model=16, d_kv=4, num_heads=2, num_layers=1, d_ff=16, vocab_size=32), "encoder–decoder"),
        (hf.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=32), "encoder–decoder"),
        (
            hf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32),
            "is_decoder = false",
        ),
    ],
)
def test_what_is_no_decoder_is_refused_by_name(config, why, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "m")
    config.save_pretrained(tmp_path / "m")
    with pytest.raises(NotTestable, match=f"{why}(?s:.*)`molehunt files`"):
        view_of(tmp_path / "m")


def test_a_bert_that_is_a_decoder_is_read(tmp_path):
    config = hf.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32, is_decoder=True
    )
    hf.BertLMHeadModel(config).save_pretrained(tmp_path)
    view_of(tmp_path).must_be_complete()


def test_an_unknown_type_has_no_view(llama, tmp_path):
    folder = configured(edited(llama, tmp_path / "m", dict), model_type="nobody_knows")
    assert loaded_views(Checkpoint.open(llama), Checkpoint.open(folder)) is None


def test_of_two_folders_the_encoder_is_named(tmp_path: Path) -> None:
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(NotTestable, match=r"^vectors: this is an encoder \(bert"):
        skeleton(tmp_path / "vectors")
