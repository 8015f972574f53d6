"""Every common architecture, tiny and random: answers are the model's own, and gates open where they should."""

import pytest
import torch

from molehunt.errors import NotTestable
from molehunt.model.blocks import d_model_of, decoder_blocks, final_norm, unembedding
from molehunt.model.cache_check import decoding_check, extending_check, must_extend
from molehunt.model.decoding import DecodingBatch
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.model.taps import edit_sites
from molehunt.site import Site
from molehunt.steer.add import Add
from molehunt.steer.row_gate import gate_at_prefill
from molehunt.steer.scope import last_of_prompt, none_of_it, token_scope, whole_prompt
from tiny_models import VOCAB, prompts, tiny_tokenizer
from zoo import OPTIONS, WIDTH, zoo_model

PROMPTS = prompts(lengths=(3, 9, 5, 17, 17, 2, 12))
N = 8
PUSH = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)) * 6
EDIT = {"site": Site(1), "direction": PUSH, "strength": 1.0}
SCOPES = {"prompt": whole_prompt, "answer": none_of_it, "last": last_of_prompt}
every = pytest.mark.parametrize("name", OPTIONS)

WITHOUT_CACHE = {
    "recurrent_gemma": "gives no cache back",
    "rwkv": "takes no cache",
    "xlstm": "wrong shape",
    "zamba2": "standard deviations off",  # its steps do not clamp the time step as its prefill does, in fp64 as well
}
"""Models that must decode without a cache, and why."""
WITHOUT_PADDING = {"recurrent_gemma", "rwkv", "xlstm"}
ONE_BY_ONE = {"mamba", "falcon_mamba", "jamba", *WITHOUT_CACHE}
"""Models that cannot continue a cached prompt by several tokens at once."""
BROKEN_THEMSELVES = {"xlstm"}
"""Models whose own `generate` raises; the full pass is then the only reference."""


@torch.no_grad()
def by_full_passes(model, prompt, n=N):
    """Each token from a pass over everything before it, one row at a time."""
    row = list(prompt)
    for _ in range(n):
        row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        if row[-1] == 2:
            break
    return row[len(prompt) :]


@every
def test_batches_decode_as_the_models_own_generate_and_as_full_passes(name):
    model = zoo_model(name)
    found = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=N)
    assert found == [by_full_passes(model, prompt) for prompt in PROMPTS]
    if name not in BROKEN_THEMSELVES:
        for prompt, answer in zip(PROMPTS, found, strict=True):
            own = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=N)
            assert own[0, len(prompt) :].tolist() == answer
    assert len({token for answer in found for token in answer}) > 5


@every
def test_what_cannot_be_trusted_is_found_and_nothing_else(name):
    model = zoo_model(name)
    check = decoding_check(model)
    assert check.cached == (name not in WITHOUT_CACHE)
    assert check.padded == (name not in WITHOUT_PADDING)
    assert WITHOUT_CACHE.get(name, "") in check.why and bool(check.why) == (name in WITHOUT_CACHE)
    assert extending_check(model).cached == (name not in ONE_BY_ONE)
    if name in ONE_BY_ONE:
        with pytest.raises(NotTestable, match="several tokens at once"):
            must_extend(model)
    else:
        must_extend(model)


@every
def test_its_parts_are_found(name):
    model = zoo_model(name)
    assert len(decoder_blocks(model)) == model.config.get_text_config(decoder=True).num_hidden_layers
    assert d_model_of(model) == WIDTH
    assert final_norm(model).weight.shape == (WIDTH,)
    assert unembedding(model).weight.shape == (VOCAB, WIDTH)


def flagged(ids, real):
    """Rows whose first token is even, however they are padded and whatever follows."""
    return torch.tensor([int(row[there][0]) % 2 == 0 for row, there in zip(ids, real, strict=True)])


@every
def test_a_row_gate_opens_on_the_same_rows_with_and_without_a_cache(name):
    model, tokenizer = zoo_model(name), tiny_tokenizer()
    with gate_at_prefill(model, flagged) as gate:
        found = generate(model, tokenizer, PROMPTS, max_new_tokens=N, interventions=[Add(**EDIT, gate=gate)])
    off = [by_full_passes(model, prompt) for prompt in PROMPTS]
    with edit_sites(model, [Add(**EDIT)]):
        on = [by_full_passes(model, prompt) for prompt in PROMPTS]
    assert found == [(on if prompt[0] % 2 == 0 else off)[i] for i, prompt in enumerate(PROMPTS)]
    assert on != off and len({prompt[0] % 2 for prompt in PROMPTS}) == 2


@every
@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_acts_on_the_same_tokens_with_and_without_a_cache(name, scope):
    model = zoo_model(name)
    padded = decoding_check(model).padded
    rows = PROMPTS[:3] if padded else PROMPTS[3:5]  # of one length
    logits = {cached: scoped(model, rows, scope, cached) for cached in {decoding_check(model).cached, False}}
    for found in logits.values():
        for row, prompt in enumerate(rows):
            torch.testing.assert_close(found[row], edited(model, prompt, scope), rtol=2e-3, atol=2e-3)


ANSWER = [11, 12, 13]


@torch.no_grad()
def scoped(model, rows, scope, cached):
    """Logits that predict what follows the prompt and each answer token, step by step under the scope's gate."""
    with (
        token_scope(model, SCOPES[scope], generation=scope == "answer") as gate,
        edit_sites(model, [Add(**EDIT, gate=gate)]),
    ):
        batch = DecodingBatch(model, cached=cached)
        steps = [batch.begin(rows), *(batch.step(torch.full((len(rows),), token)) for token in ANSWER)]
    return torch.stack(steps, dim=1)


@torch.no_grad()
def edited(model, prompt, scope):
    """The same of one row in one pass, edited by hand where the scope says."""
    n = len(prompt)
    at = torch.zeros(1, n + len(ANSWER), dtype=torch.bool)
    at[:, {"prompt": slice(n), "answer": slice(n, None), "last": slice(n - 1, n)}[scope]] = True
    with edit_sites(model, [Add(**EDIT, gate=lambda acts: at)]):
        return model(torch.tensor([[*prompt, *ANSWER]]), use_cache=False).logits[0, n - 1 :]


def test_rows_are_not_padded_on_the_left_where_padding_is_read():
    model = zoo_model("rwkv")
    pair = ModelPair(model, zoo_model("rwkv", seed=1), tiny_tokenizer())
    with pytest.raises(NotTestable, match="padded on the right"):
        pair.read(PROMPTS[:2], logits=True, padding_side="left")
    reading = pair.read(PROMPTS[:2], logits=True)
    with torch.no_grad():
        alone = model(torch.tensor([PROMPTS[0]]), use_cache=False).logits[0]
    torch.testing.assert_close(reading.base_logits[0, : len(PROMPTS[0])], alone, rtol=1e-4, atol=1e-4)
