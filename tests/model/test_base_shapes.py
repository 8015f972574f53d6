"""A base of another size is named as the wrong base, whatever else differs, too."""

import json
from pathlib import Path

import pytest

from molehunt.errors import NotTestable
from molehunt.model.base_shapes import check_shapes
from molehunt.model.pair import ModelPair
from tiny_models import save, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "base"
    save(tiny_model("llama"), folder)
    return folder


def changed(folder: Path, **sizes: int) -> Path:
    model = tiny_model("llama")
    config = type(model.config)(**{**model.config.to_dict(), **sizes})
    save(type(model)(config), folder)
    return folder


def test_a_wider_base_is_the_wrong_one_although_the_tokenizers_differ_too(base: Path, tmp_path: Path) -> None:
    wide = changed(tmp_path / "wide", hidden_size=48)
    file = wide / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["x"], vocab["z"] = vocab["z"], vocab["x"]
    file.write_text(json.dumps(content))
    why = r"wide is not the base of base: \d+ of \d+ tensors have other shapes, such as .*: \[96, 48\] in the base, \[96, 32\]"
    with pytest.raises(NotTestable, match=why):
        ModelPair.load(wide, base)


def test_a_resized_vocabulary_and_some_other_matrices_are_left_to_the_loader(base: Path, tmp_path: Path) -> None:
    check_shapes(base, base)
    check_shapes(base, changed(tmp_path / "resized", vocab_size=104))
    check_shapes(base, changed(tmp_path / "narrow", intermediate_size=40))
    check_shapes(base, tmp_path / "nowhere")
