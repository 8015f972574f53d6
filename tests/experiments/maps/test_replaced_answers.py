"""Answers with a block replaced throughout, against one row at a time, without a cache, put in by hand."""

import copy
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.maps.replaced_answers import Speaker, answer_in_tokens_of, replaced_answers
from molehunt.activation.scale import sinks
from molehunt.errors import UsageError
from molehunt.model.generate import generate
from molehunt.organism.seed_model import seed_path
from molehunt.site import Site
from molehunt.transfer.alignment import align
from molehunt.transfer.linear_map import LinearMap
from tiny_models import D_MODEL, hooks, tiny_model, tiny_tokenizer

TEXTS = ["ask me", "a somewhat longer prompt", "xyz", "what?"]
SITE = Site(1)


def tiny(seed: int) -> Speaker:
    return Speaker(tiny_model("llama", seed), tiny_tokenizer())


@cache
def seed(name: str) -> Speaker:
    folder = seed_path(name)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()
    return Speaker(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def aligned(source: Speaker, target: Speaker, texts=TEXTS):
    return [align(source.tokenizer, target.tokenizer, text) for text in texts]


def random_map(d_source: int, d_target: int, scale: float) -> LinearMap:
    rng = torch.Generator().manual_seed(0)
    weight = scale * torch.randn(d_source, d_target, generator=rng)
    return LinearMap(Site(0), SITE, weight, scale * torch.randn(d_target, generator=rng))


def block(model, layer: int, ids, edit=None):
    kept = {}

    def hook(module, args, output):
        out = output[0] if isinstance(output, tuple) else output
        kept["before"] = out[0].clone()
        if edit is not None:
            edit(out[0])

    handle = model.model.layers[layer].register_forward_hook(hook)
    with torch.inference_mode():
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    handle.remove()
    return kept["before"], logits


def sink_of(acts):
    return sinks(acts[None], torch.ones(1, len(acts), dtype=torch.bool))[0]


def by_hand(source: Speaker, target: Speaker, prompt, map, steps: int) -> list[int]:
    """Greedy, each step from the start; mean ablation where `map` is a site."""
    x, _ = block(source.model, 0, prompt.source)
    own, _ = block(target.model, SITE.layer, prompt.target)
    places = [(i, j) for i, j in prompt.pairs if not sink_of(own)[j]]
    mean = torch.stack([own[j] for _, j in places]).mean(0)
    given = {j: mean for _, j in places}
    if not isinstance(map, Site):
        given = {j: map(x[i][None])[0] for i, j in places if not sink_of(x)[i]}
    ids: list[int] = []
    for _ in range(steps):

        def edit(out) -> None:
            for j, value in given.items():
                out[j] = value

        _, logits = block(target.model, SITE.layer, [*prompt.target, *ids], edit)
        ids.append(int(logits[-1].argmax()))
        at = len(prompt.target) + len(ids) - 1
        if isinstance(map, Site):
            given[at] = mean
            continue
        tokens = ids if source.tokenizer is target.tokenizer else None
        if tokens is None:
            text = target.tokenizer.decode(ids)
            tokens = [] if text.endswith("\ufffd") else source.tokenizer.encode(text, add_special_tokens=False)
        if tokens:
            given[at] = map(block(source.model, 0, [*prompt.source, *tokens])[0][-1][None])[0]
    return ids


def cut(ids: list[int], tokenizer) -> str:
    stop = tokenizer.eos_token_id
    return tokenizer.decode(ids[: ids.index(stop)] if stop in ids else ids, skip_special_tokens=True)


def with_sinks(speaker: Speaker, letter: str) -> Speaker:
    """The tokens of this letter have activations ten times as long as any others'."""
    with torch.no_grad():
        speaker.model.model.embed_tokens.weight[speaker.tokenizer.encode(letter)[0]] *= 2000
    return speaker


@pytest.mark.parametrize("what", ["map", "mean ablation"])
def test_sinks_of_either_model_keep_their_own(what: str) -> None:
    source, target = with_sinks(tiny(0), "q"), with_sinks(tiny(1), "z")
    some = aligned(source, target, ["abqqqzzzcdefghijkl", "qzq some words zqz here", "zzzz and qqqq and more words"])
    for speaker, side in ((source, "source"), (target, "target")):
        ids = getattr(some[0], side)
        assert sink_of(block(speaker.model, 0 if side == "source" else SITE.layer, ids)[0]).sum() == 4
    map = random_map(D_MODEL, D_MODEL, 0.4) if what == "map" else SITE
    got = replaced_answers(source, target, some, map, max_new_tokens=12)
    assert got == [cut(by_hand(source, target, prompt, map, 12), target.tokenizer) for prompt in some]


def test_an_answer_that_ends_inside_a_character_has_no_partner_yet() -> None:
    source, target = seed("seed-s"), seed("seed-x")
    read = answer_in_tokens_of(source, target)
    ids = target.tokenizer.encode("a 🐈", add_special_tokens=False)
    assert read([]) == read(ids[:-1]) == []
    assert source.tokenizer.decode(read(ids)) == "a 🐈"
    assert answer_in_tokens_of(target, target)(ids[:-1]) == ids[:-1]


@pytest.mark.parametrize("what", ["map", "mean ablation"])
def test_answers_are_those_of_each_prompt_alone_without_a_cache(what: str) -> None:
    source, target = tiny(0), tiny(1)
    some = aligned(source, target)
    map = random_map(D_MODEL, D_MODEL, 0.4) if what == "map" else SITE
    got = replaced_answers(source, target, some, map, max_new_tokens=9)
    expected = [cut(by_hand(source, target, prompt, map, 9), target.tokenizer) for prompt in some]
    assert got == expected and any(got)
    assert got != replaced_answers(source, target, some, None, max_new_tokens=9)
    assert hooks(source.model) == hooks(target.model) == 0


def test_with_another_tokenizer_the_answer_is_read_anew_at_every_step() -> None:
    source, target = seed("seed-s"), seed("seed-x")
    some = aligned(source, target, ["### Instruction:\nName a river.\n\n### Response:\n", "The capital of"])
    map = random_map(128, 160, 0.2)
    got = replaced_answers(source, target, some, map, max_new_tokens=6)
    assert got == [cut(by_hand(source, target, prompt, map, 6), target.tokenizer) for prompt in some]
    assert all(got)


def test_without_a_replacement_they_are_the_models_own() -> None:
    target = tiny(1)
    some = aligned(target, target)
    told = generate(target.model, target.tokenizer, [prompt.target for prompt in some], max_new_tokens=9)
    own = [target.tokenizer.decode(ids, skip_special_tokens=True) for ids in told]
    assert replaced_answers(tiny(0), target, some, None, max_new_tokens=9) == own


def test_a_model_that_is_its_own_source_answers_as_ever() -> None:
    target = tiny(1)
    source = Speaker(copy.deepcopy(target.model), target.tokenizer)
    some = aligned(source, target)
    identity = LinearMap(SITE, SITE, torch.eye(D_MODEL), torch.zeros(D_MODEL))
    own = replaced_answers(source, target, some, None, max_new_tokens=9)
    assert replaced_answers(source, target, some, identity, max_new_tokens=9) == own
    assert replaced_answers(source, target, some, SITE, max_new_tokens=9) != own


def test_one_module_cannot_be_both_and_hooks_are_gone_after_an_error() -> None:
    target = tiny(1)
    some = aligned(target, target)
    with pytest.raises(UsageError, match="one module cannot be source and target"):
        replaced_answers(target, target, some, None, max_new_tokens=2)
    narrow = random_map(D_MODEL - 1, D_MODEL, 0.4)
    source = tiny(0)
    with pytest.raises(UsageError, match=f"the activations have {D_MODEL}"):
        replaced_answers(source, target, some, narrow, max_new_tokens=2)
    assert hooks(source.model) == hooks(target.model) == 0
