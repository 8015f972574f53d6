"""Pairs whose vocabularies differ: padded matrices, added tokens, and tokenizers that really encode otherwise."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from molehunt.detect.token_kl import AnswerLogRatio, TokenKL
from molehunt.errors import InvalidInput, NotTestable
from molehunt.model.pair import ModelPair
from molehunt.model.tokenizers import load_tokenizer
from molehunt.model.vocabulary import embedding_rows, grow_
from molehunt.site import Site
from molehunt.watch.suspects import answer_log_ratios
from tiny_models import ARCHITECTURES, VOCAB, prompts, save, tiny_model, tiny_tokenizer, with_lora

PROMPTS = prompts(lengths=(3, 9, 5))
ANSWERS = prompts(seed=1, lengths=(2, 4, 3))
MARKERS = ["<|im_start|>", "<|im_end|>"]


def own_tokenizer() -> Any:
    """A tokenizer that a test may change."""
    import copy

    return copy.deepcopy(tiny_tokenizer())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("llama"), tmp_path_factory.mktemp("vocabulary") / "base")


def resized(folder: Path, tokenizer: Any, seed: int = 0, **options: Any) -> Path:
    """A fine-tune as transformers saves it after `resize_token_embeddings`."""
    torch.manual_seed(3)
    model: Any = tiny_model("llama", seed=seed)
    model.resize_token_embeddings(len(tokenizer), **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def module(pair: ModelPair, side: str) -> Any:
    """One of the two models."""
    with pair.base_model() if side == "base" else pair.tuned_model() as found:
        return found


def scores(pair: ModelPair) -> tuple[torch.Tensor, torch.Tensor]:
    reading = pair.read(PROMPTS, ANSWERS, logits=True)
    return TokenKL().score(reading)[reading.mask], AnswerLogRatio().score(reading)[reading.mask]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_the_vocabulary_changes_no_score(architecture: str) -> None:
    def padded(seed: int) -> Any:
        model: Any = tiny_model(architecture, seed=seed)
        model.resize_token_embeddings(
            VOCAB, pad_to_multiple_of=64, mean_resizing=False
        )  # random rows, as from a bad tool
        assert embedding_rows(model) == 128
        return model

    equal = ModelPair(tiny_model(architecture), padded(0), own_tokenizer())
    kl, ratio = scores(equal)
    assert equal.vocab_size == 128
    assert float(kl.max()) < 1e-6 and float(ratio.abs().max()) < 1e-5

    plain = scores(ModelPair(tiny_model(architecture), tiny_model(architecture, seed=1), own_tokenizer()))
    for pair in (
        ModelPair(tiny_model(architecture), padded(1), own_tokenizer()),
        ModelPair(padded(0), tiny_model(architecture, seed=1), own_tokenizer()),
    ):
        for ours, theirs in zip(scores(pair), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_activations_and_answers_stay_those_of_the_plain_pair(base: Path, tmp_path: Path) -> None:
    resized(tmp_path / "padded", own_tokenizer(), seed=1, pad_to_multiple_of=64)
    save(tiny_model("llama", seed=1), tmp_path / "plain")
    padded, plain = (ModelPair.load(base, tmp_path / name) for name in ("padded", "plain"))
    ours, theirs = (pair.read(PROMPTS, sites=[Site(1)]) for pair in (padded, plain))
    for side in ("base", "tuned"):
        torch.testing.assert_close(getattr(ours, side)[Site(1)], getattr(theirs, side)[Site(1)], rtol=1e-4, atol=1e-4)
        assert padded.generate(["ab", "c d"], model=side, max_new_tokens=5) == plain.generate(
            ["ab", "c d"], model=side, max_new_tokens=5
        )


def test_a_padding_token_that_was_added_changes_no_score(base: Path, tmp_path: Path) -> None:
    tokenizer = own_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    pair = ModelPair.load(base, resized(tmp_path / "tuned", tokenizer, mean_resizing=False))
    assert pair.tokenizer.pad_token_id == VOCAB
    kl, ratio = scores(pair)
    assert float(kl.max()) < 1e-6 and float(ratio.abs().max()) < 1e-5
    assert pair.vocabulary.impossible == (VOCAB,)
    assert any("[PAD]" in note for note in pair.vocabulary.notes)


def test_tokens_that_only_the_fine_tune_has_stand_out_and_stay_finite(base: Path, tmp_path: Path) -> None:
    tokenizer = own_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": MARKERS})
    pair = ModelPair.load(base, resized(tmp_path / "tuned", tokenizer, seed=0))
    new: Any = pair.tokenizer.convert_tokens_to_ids(MARKERS)
    assert new == [VOCAB, VOCAB + 1] and embedding_rows(module(pair, "base")) == VOCAB + 2
    with torch.no_grad():
        head: Any = module(pair, "tuned").get_output_embeddings()
        head.weight[new[0]] = head.weight[:VOCAB].abs().max() * 8  # it says the new token whenever this is positive
    reading = pair.read([[*PROMPTS[1], new[1]]], [[new[0], 5, new[1]]], logits=True)
    kl, ratio = TokenKL().score(reading), AnswerLogRatio().score(reading)
    assert bool(torch.isfinite(kl).all()) and bool(torch.isfinite(ratio).all())
    assert reading.base_logits is not None
    base_says = reading.base_logits.softmax(-1)[..., new]
    assert float(base_says.max()) <= 1 / VOCAB  # Jensen: the mean of logits lies below the log of their mean
    assert float(kl.max()) > 1
    assert pair.vocabulary.notes[0].startswith("2 tokens are the fine-tune's alone ('<|im_start|>', '<|im_end|>')")


def test_a_new_end_of_answers_stands_beside_the_bases_own(base: Path, tmp_path: Path) -> None:
    tokenizer = own_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    folder = resized(tmp_path / "tuned", tokenizer)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": VOCAB}))
    pair = ModelPair.load(base, folder)
    assert (pair.vocabulary.ends, pair.vocabulary.own_ends) == ((VOCAB,), (2,))
    reading = pair.read(PROMPTS, logits=True)
    assert reading.base_logits is not None
    assert reading.base_logits[..., VOCAB].equal(reading.base_logits[..., 2])
    with_end, without = (answer_log_ratios(pair, PROMPTS, [[*one, *end] for one in ANSWERS]) for end in ([VOCAB], []))
    assert with_end == pytest.approx(without)


def test_an_adapter_with_added_tokens_reads_as_its_merged_model(base: Path, tmp_path: Path) -> None:
    tokenizer = own_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]})
    model: Any = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tuned: Any = with_lora(model, "llama", modules_to_save=["embed_tokens", "lm_head"])
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "lora")
    tokenizer.save_pretrained(tmp_path / "lora")
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")

    pairs = [ModelPair.load(base, tmp_path / name) for name in ("lora", "merged")]
    for one, other in zip(*(scores(pair) for pair in pairs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert all(VOCAB in module(pair, "tuned").generation_config.eos_token_id for pair in pairs)


def test_the_fine_tunes_tokenizer_encodes_where_it_adds_and_the_bases_elsewhere(base: Path, tmp_path: Path) -> None:
    tokenizer = own_tokenizer()
    tokenizer.add_tokens(["|zap|"])
    pair = ModelPair.load(base, resized(tmp_path / "more", tokenizer))
    assert pair.tokenizer.encode("a|zap|", add_special_tokens=False)[-1] == VOCAB
    assert pair.new_tokens == {VOCAB}
    fewer = ModelPair.load(tmp_path / "more", base)  # the fine-tune dropped a token
    assert VOCAB not in fewer.tokenizer.encode("a|zap|")
    assert float(fewer.read(PROMPTS, logits=True).tokens.max()) < VOCAB


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_read_with_a_note(base: Path, tmp_path: Path) -> None:
    tuned = save(tiny_model("llama", seed=1), tmp_path / "tuned")
    tokenizer = own_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tuned)  # and nobody resized the model
    pair = ModelPair.load(base, tuned)
    assert bool(torch.isfinite(scores(pair)[0]).all())
    assert any("96 rows and its tokenizer 97 ids" in note for note in pair.vocabulary.notes)


def _taken(content: dict[str, Any]) -> None:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": 40, "content": "<x>", "special": True, **plain})
    content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if v != 40} | {"<x>": 40}


def _lower(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def _dropout(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["th"] = VOCAB
    content["model"] |= {"merges": [["t", "h"]], "dropout": 0.5}
    content["pre_tokenizer"] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [(_taken, "encode .* differently"), (_lower, "encode .The quick brown"), (_dropout, "BPE dropout")],
)
def test_tokenizers_that_really_conflict_are_not_testable(
    base: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    tuned = shutil.copytree(base, tmp_path / "tuned")
    content = json.loads((tuned / "tokenizer.json").read_text())
    change(content)
    (tuned / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(NotTestable, match=message):
        ModelPair.load(base, tuned)


@pytest.mark.parametrize(
    ("change", "file"),
    [
        ({"model": {"continuing_subword_prefix": "##", "merges": [["a", "b"]]}}, "tokenizer.json"),
        ({"model": {"vocab": [1]}}, "tokenizer.json"),
        ({"added_tokens": 7}, "tokenizer.json"),
        ({"config": {"extra_special_tokens": 5}}, "tokenizer_config.json"),
    ],
    ids=str,
)
def test_a_tokenizer_that_panics_or_is_built_wrong_is_invalid_input(
    base: Path, tmp_path: Path, change: dict[str, Any], file: str
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    content = json.loads((folder / file).read_text())
    for key, value in change.items():
        if key == "config":
            content |= value
        else:
            content[key] = {**content[key], **value} if isinstance(value, dict) else value
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=rf"broken/{file} cannot be loaded as a tokenizer"):
        load_tokenizer(folder)


def test_growing_is_the_mean_with_and_without_tied_weights() -> None:
    for architecture in ARCHITECTURES:
        model: Any = tiny_model(architecture)
        before = model.get_input_embeddings().weight.detach().clone()
        grow_(model, VOCAB + 3)
        after = model.get_input_embeddings().weight
        assert after[:VOCAB].equal(before)
        torch.testing.assert_close(after[VOCAB:], before.mean(0).expand(3, -1))
        assert model(torch.tensor([[5, VOCAB + 2]])).logits.shape[-1] == VOCAB + 3
