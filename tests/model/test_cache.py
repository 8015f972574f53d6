"""The seam to a model's cache: every name that transformers has given it, in calls and in outputs."""

import copy

import pytest
import torch

from molehunt.errors import CannotTap
from molehunt.model import cache as seam
from molehunt.model.cache import (
    NAMES,
    Uncached,
    announced,
    branched,
    is_filled,
    left_by,
    on_decoder_calls,
    select_rows,
    takes,
    with_cache,
)
from molehunt.model.decoding import DecodingBatch
from molehunt.model.generate import generate
from molehunt.model.taps import without_hooks
from renamed_cache import renamed
from tiny_models import hooks, prompts, tiny_model, tiny_tokenizer, with_lora
from zoo import zoo_model

IDS = torch.tensor(prompts(lengths=(5, 5)))
ROWS = prompts(lengths=(3, 9, 5, 1))
every_name = pytest.mark.parametrize("name", NAMES)


def calls_of(model, run):
    """What hooks are shown while `run` runs the model."""
    seen = []
    with torch.no_grad(), on_decoder_calls(model, seen.append):
        run(model)
    return seen


@every_name
def test_a_model_decodes_alike_whatever_its_cache_is_called(name):
    found = generate(renamed(name), tiny_tokenizer(), ROWS, max_new_tokens=8, stop=())
    assert found == generate(tiny_model("llama"), tiny_tokenizer(), ROWS, max_new_tokens=8, stop=())


@every_name
def test_steps_and_prefills_are_told_apart_in_calls_of_anybody(name):
    def run(model):
        left = left_by(model(IDS[:, :3], use_cache=True))
        for i in (3, 4):
            left = left_by(model(IDS[:, i : i + 1], **{name: left}))
        model(IDS, use_cache=False)

    seen = calls_of(renamed(name), run)
    assert [call.begins for call in seen] == [True, False, False, True]
    assert [call.again for call in seen] == [0] * 4
    assert seen[1].cache is seen[2].cache is not None
    assert seen[0].tokens()[0].equal(IDS[:, :3])


def test_a_cache_that_is_given_by_position_is_seen():
    def run(model):
        left = left_by(model.model(IDS, use_cache=True))
        model.model(IDS[:, :1], None, None, left)

    assert [call.begins for call in calls_of(tiny_model("llama"), run)] == [True, False]


@every_name
def test_a_name_that_is_not_known_is_refused_and_never_taken_for_a_prefill(name, monkeypatch):
    model = renamed(name)
    batch = DecodingBatch(model)
    batch.begin(ROWS)
    monkeypatch.setattr(seam, "NAMES", tuple(other for other in NAMES if other != name))
    with pytest.raises(CannotTap, match="by a name that Molehunt knows"):
        batch.step(torch.zeros(len(ROWS), dtype=torch.long))


def test_a_decoder_that_is_not_shown_the_cache_is_refused():
    """As in transformers 5.24, whose models handed their decoders an argument of a name that hooks did not know."""
    model = tiny_model("llama")
    with (
        on_decoder_calls(model, lambda call: None),
        announced(model, begins=False),
        pytest.raises(CannotTap, match="does not show its decoder the cache"),
    ):
        model(IDS)


def test_an_announcement_is_of_one_model_and_ends_with_its_block():
    one, other = tiny_model("llama"), tiny_model("llama", seed=1)
    uncached = Uncached(2)
    with announced(one, begins=False, uncached=uncached):
        assert [call.begins for call in calls_of(other, lambda m: m(IDS))] == [True]
        inside = calls_of(one, lambda m: m(IDS, use_cache=False))
    assert [(call.begins, call.again, call.cache) for call in inside] == [(False, 2, uncached)]
    assert [call.begins for call in calls_of(one, lambda m: m(IDS))] == [True]


@pytest.mark.parametrize("cached", [True, False])
def test_hooks_see_one_batch_from_beginning_to_end(cached):
    model, seen, left = tiny_model("llama"), [], []

    def run(model):
        batch = DecodingBatch(model, cached=cached)
        for tokens in range(3):
            if tokens:
                batch.step(torch.full((len(batch),), 7))
            else:
                batch.begin(ROWS)

    with torch.no_grad(), on_decoder_calls(model, seen.append, left.append):
        run(model)
    assert [call.begins for call in seen] == [True, False, False]
    assert [call.again for call in seen] == [0, 0 if cached else 9, 0 if cached else 9]
    assert len({id(cache) for cache in left}) == 1 and seen[1].cache is left[0]
    assert hooks(model) == 0


def test_hooks_rest_inside_a_look_at_the_model():
    model = tiny_model("llama")
    with torch.no_grad(), without_hooks():
        assert [call.begins for call in calls_of(model, lambda m: m(IDS))] == [True]  # entered inside
    seen = []
    with torch.no_grad(), on_decoder_calls(model, seen.append):
        with without_hooks():
            model(IDS)
        assert not seen
        model(IDS)
    assert len(seen) == 1


def test_arguments_and_their_absence():
    model = tiny_model("llama")
    assert takes(model, "position_ids") and takes(with_lora(tiny_model("llama"), "llama"), "position_ids")
    assert not takes(zoo_model("bloom"), "position_ids")
    with pytest.raises(CannotTap, match="takes no cache"):
        with_cache(zoo_model("rwkv"), None)
    assert left_by(model(IDS, use_cache=False)) is None
    assert left_by((IDS,)) is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3", "mamba", "jamba"])
def test_caches_of_every_kind_say_whether_they_are_filled_and_give_up_rows(name):
    from transformers import DynamicCache

    model = zoo_model(name)
    assert not is_filled(None) and not is_filled(DynamicCache()) and not is_filled(DynamicCache(config=model.config))
    left = left_by(model(IDS, use_cache=True))
    assert is_filled(left)
    select_rows(left, torch.tensor([1]))
    step = torch.tensor([[9]])
    full = model(torch.cat([IDS[1:], step], 1), use_cache=False).logits[:, -1]
    torch.testing.assert_close(model(step, **with_cache(model, left)).logits[:, -1], full, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_branches_grow_apart_and_recurrent_states_have_none():
    model = tiny_model("gemma3")
    stem = left_by(model(IDS, use_cache=True))
    before = copy.deepcopy(stem)
    one, other = (model(torch.tensor([[t], [t]]), **with_cache(model, branched(stem))).logits for t in (7, 8))
    assert not one.equal(other)
    again = model(torch.tensor([[7], [7]]), **with_cache(model, branched(stem))).logits
    assert again.equal(one)
    assert all(a.keys.equal(b.keys) for a, b in zip(stem.layers, before.layers, strict=True))
    assert branched(None) is None
    for name in ("mamba", "jamba"):
        hybrid = zoo_model(name)
        with pytest.raises(CannotTap, match="recurrent state"):
            branched(left_by(hybrid(IDS, use_cache=True)))
