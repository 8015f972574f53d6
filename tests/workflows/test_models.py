"""What a verb takes as its two models: folders, or a pair that is loaded already."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from molehunt.errors import MolehuntError, UsageError
from molehunt.model.pair import ModelPair
from molehunt.organism.seed_model import seed_path
from molehunt.workflows.models import adapter_choice, open_models
from tiny_models import with_lora
from watched_track import WatchedTrack

BASE = seed_path("seed-s")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, trust_remote_code=False)
    with_lora(model, "llama").save_pretrained(folder)
    return folder


def test_folders_are_loaded_and_a_loaded_pair_is_taken_as_it_is(adapter: Path) -> None:
    opened = open_models(BASE, adapter)
    assert (opened.base, opened.tuned, opened.adapter) == (BASE, adapter, None) and opened.pair.shared
    again = open_models(opened.pair)
    assert again.pair is opened.pair and (again.base, again.tuned) == (BASE, adapter)
    assert open_models(str(BASE), str(adapter)).tuned == adapter


def test_files_and_their_hash_belong_to_the_folders(adapter: Path) -> None:
    opened = open_models(BASE, adapter)
    base, tuned = opened.checkpoints
    assert (base.kind, tuned.kind) == ("model", "adapter")
    assert opened.tuned_hash == tuned.content_hash() != base.content_hash()


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda pair: open_models(pair, BASE), "a loaded pair holds both models"),
        (lambda pair: open_models(BASE), "give the base and its fine-tune, or one loaded ModelPair"),
        (lambda pair: open_models(unsaved(pair)), "made from models in memory"),
    ],
)
def test_what_is_no_two_models_is_refused_with_what_to_do(
    adapter: Path, call: Callable[[ModelPair], object], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        call(ModelPair.load(BASE, adapter))


def unsaved(pair: ModelPair) -> ModelPair:
    with pair.tuned_model() as model:
        return ModelPair(model, model, pair.tokenizer)


def test_a_folder_that_is_none_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(MolehuntError, match="There is no folder"):
        open_models(BASE, tmp_path / "nothing")


def test_what_to_do_with_an_adapter_beside_weights() -> None:
    assert [adapter_choice(each) for each in (None, True, False)] == ["refuse", "use", "ignore"]


def test_loading_is_shown_on_the_track(adapter: Path) -> None:
    track = WatchedTrack()
    open_models(BASE, adapter, track=track)
    assert track.calls[0].what == "loading seed-s and adapter" and not track.calls[0].open
