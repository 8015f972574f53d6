"""SavedMap maps, refused for models that they were not fitted to and when they are broken."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from molehunt.errors import InvalidInput, UsageError
from molehunt.site import Site
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.map_file import HEADER, MapFacts, ModelHashes
from molehunt.transfer.saved import MapEnd, load_map
from molehunt.transfer.trained import TrainedMap
from tiny_models import D_MODEL, tiny_model, with_lora

MODELS = ModelHashes(source="a" * 64, target="b" * 64, source_tokenizer="c" * 64, target_tokenizer="d" * 64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    weight = torch.randn(4, D_MODEL, generator=torch.Generator().manual_seed(0))
    facts = MapFacts(method="ridge, λ = 1", tokens=9, models=MODELS)
    return LinearMap(Site(1), Site(2), weight, weight[0].clone(), facts).save(tmp_path / "map.safetensors")


def source(**other: object) -> MapEnd:
    return MapEnd(**{"site": Site(1), "d_model": 4, "checkpoint": "a" * 64, "tokenizer": "c" * 64, **other})


def test_the_models_it_was_fitted_to_are_taken(path: Path) -> None:
    target = MapEnd.of(tiny_model("llama"), Site(2), checkpoint="b" * 64, tokenizer="d" * 64)
    assert target.d_model == D_MODEL
    assert load_map(path, source=source(), target=target).facts.models == MODELS
    assert load_map(path, source=source(checkpoint=None, tokenizer=None)).widths == (4, D_MODEL)
    inverse = load_map(path).inverse()
    assert inverse.facts.models.source == "b" * 64 and inverse.facts.models.target_tokenizer == "c" * 64


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"d_model": 5}, r"map.safetensors: the source of this map has 4 dimensions, this model 5"),
        ({"site": Site(3)}, r"is L1.resid, not L3.resid"),
        ({"site": Site(1, "mlp")}, r"is L1.resid, not L1.mlp"),
        ({"checkpoint": "e" * 64}, r"another checkpoint \(a{12}… instead of e{12}…\)"),
        ({"tokenizer": "e" * 64}, r"another tokenizer \(c{12}… instead of e{12}…\)"),
    ],
)
def test_another_source_is_refused(path: Path, other: dict, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        load_map(path, source=source(**other))


def test_another_target_is_refused(path: Path) -> None:
    wrapped = with_lora(tiny_model("llama"), "llama")
    with pytest.raises(UsageError, match=r"the target of this map is L2.resid, not L0.resid"):
        load_map(path, target=MapEnd.of(wrapped, Site(0)))
    with pytest.raises(UsageError, match="another checkpoint"):
        load_map(path, target=MapEnd.of(wrapped, Site(2), checkpoint="a" * 64))


def rewritten(path: Path, tensors: dict | None = None, **fields: object) -> None:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[HEADER])
    save_file(tensors or load_file(path), path, {HEADER: json.dumps({**header, **fields})})


@pytest.mark.parametrize(
    "fields",
    [
        {"schema": 2},
        {"kind": "affine"},
        {"kind": "magic"},
        {"source": "L1.elsewhere"},
        {"facts": {}},
        {"facts": {"method": "m", "tokens": 1, "models": {"who": "me"}}},
    ],
)
def test_a_header_of_another_kind_is_refused(path: Path, fields: dict) -> None:
    rewritten(path, **fields)
    with pytest.raises(InvalidInput, match="is no map"):
        load_map(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.ones(4, 3), "bias": torch.ones(4)},
        {"weight": torch.ones(4), "bias": torch.ones(4)},
        {"weight": torch.full((4, 3), float("nan")), "bias": torch.ones(3)},
        {"weight": torch.ones(4, 3)},
    ],
)
def test_tensors_that_are_no_map_are_refused(path: Path, tensors: dict) -> None:
    rewritten(path, tensors)
    with pytest.raises(InvalidInput, match="is no map"):
        load_map(path)


def test_a_trained_map_whose_weights_do_not_fit_is_refused(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 5))
    path = tmp_path / "map.safetensors"
    TrainedMap(kind="autoencoder", source=Site(0), target=Site(1), net=net, history=[]).save(path)
    assert load_map(path).widths == (4, 5)
    rewritten(path, kind="affine")
    with pytest.raises(InvalidInput, match="is no map"):
        load_map(path)
    with pytest.raises(InvalidInput, match="is no map"):
        LinearMap.load(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04."])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "map.safetensors").write_bytes(content)
    for load in (load_map, LinearMap.load, TrainedMap.load):
        with pytest.raises(InvalidInput, match="is no map"):
            load(tmp_path / "map.safetensors")
    with pytest.raises(InvalidInput, match="is no map"):
        load_map(tmp_path / "gone.safetensors")
