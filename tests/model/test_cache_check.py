"""A model whose cache lies is found, decodes without one, and says so once."""

import logging

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaModel

from benchmarks.norm_fold import fold_cosines
from molehunt.errors import CannotTap, NotTestable
from molehunt.model import cache_check
from molehunt.model.cache_check import decoding_check, extending_check, unsound
from molehunt.model.generate import generate
from molehunt.model.taps import edit_sites, read_sites
from molehunt.site import Site
from molehunt.steer.add import Add
from molehunt.steer.random_edit import RandomEdit
from molehunt.steer.row_gate import RowGate
from renamed_cache import OWN
from tiny_models import D_MODEL, hooks, prompts, tiny_model, tiny_tokenizer, with_lora

PROMPTS = prompts(lengths=(3, 9, 5, 12))
SITE = Site(1)
PUSH = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2)) * 6


def text(model, interventions=()):
    return generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=6, interventions=interventions, stop=())


@torch.no_grad()
def by_full_passes(model, interventions=()):
    answers = [[] for _ in PROMPTS]
    with edit_sites(model, interventions):
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            while len(answer) < 6:
                answer.append(int(model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, -1].argmax()))
    return answers


def passes(model):
    """A list that grows with every forward pass of the model."""
    ran = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: ran.append(len(args[0])))
    return ran


class Deaf(LlamaModel):
    """Takes a cache and does not read it: what Mamba did with an argument of another name."""

    def forward(self, *args, **inputs):
        given = inputs.get(OWN)
        if given is not None and given.get_seq_length():
            from transformers import DynamicCache

            inputs[OWN] = DynamicCache(config=self.config)
            inputs["attention_mask"] = None
        return super().forward(*args, **inputs)


class Blind(LlamaModel):
    """Does not look at the attention mask: padding is text to it."""

    def forward(self, *args, **inputs):
        return super().forward(*args, **{**inputs, "attention_mask": None, "position_ids": None})


def with_decoder(kind):
    plain = tiny_model("llama")
    model = LlamaForCausalLM(plain.config)
    model.model = kind(plain.config)
    model.load_state_dict(plain.state_dict())
    return model.eval()


@pytest.mark.parametrize(("kind", "padded"), [(Deaf, True), (Blind, False)])
def test_a_model_that_is_wrong_on_its_cache_answers_as_full_passes_do_and_says_so_once(kind, padded, caplog):
    cache_check._WARNED.clear()
    model = with_decoder(kind)
    with caplog.at_level(logging.WARNING, "molehunt"):
        found = text(model)
        assert text(model) == found == by_full_passes(model)
        assert text(with_decoder(kind)) == found
    check = decoding_check(model)
    assert (check.cached, check.padded) == (False, padded)
    assert "standard deviations off" in check.why
    [said] = caplog.records
    assert "decoded without a cache" in said.getMessage() and "LlamaForCausalLM" in said.getMessage()
    assert unsound(model) == (check.why,) and not unsound(tiny_model("llama"))


def test_a_sound_model_is_checked_once_and_costs_nothing_after():
    model = tiny_model("llama")
    ran = passes(model)
    check = decoding_check(model)
    assert (check.cached, check.padded, check.why) == (True, True, "")
    assert 0 < len(ran) <= 2 + 4  # two rows alone; a prefill and three steps
    ran.clear()
    assert decoding_check(model) is check and not ran
    assert extending_check(model).cached and extending_check(model).cached
    assert len(ran) == 2 + 2
    assert decoding_check(tiny_model("llama", seed=4)) is not check


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_no_lie_in_any_dtype(dtype):
    assert decoding_check(tiny_model("llama").to(dtype)).cached
    assert not decoding_check(with_decoder(Deaf).to(dtype)).cached
    assert decoding_check(with_lora(tiny_model("llama"), "llama")).cached


class Centred:
    """Takes away what the tokens of a pass have in common: in a step there is one token, and nothing is left."""

    site = SITE

    def __call__(self, acts):
        return acts - acts.mean(1, keepdim=True)


class Later(Centred):
    """Acts on all tokens but the first of a pass."""

    def __call__(self, acts):
        pushed = acts + PUSH
        pushed[:, :1] = acts[:, :1]
        return pushed


def test_an_intervention_that_takes_a_step_for_a_prefill_acts_in_full_passes():
    model = tiny_model("llama")
    assert decoding_check(model).cached and decoding_check(model, [Add(SITE, PUSH, 1.0)]).cached
    check = decoding_check(model, [Later()])
    assert not check.cached and unsound(model) == (f"under an intervention, {check.why}",)
    assert not decoding_check(model, [Centred()]).cached  # a step is centred to nothing
    assert decoding_check(model).cached
    with edit_sites(model, [Later()]):  # in place already, as a vector that is applied
        assert not decoding_check(model).cached
        assert not extending_check(model).cached
    assert extending_check(model).cached
    assert text(model, [Add(SITE, PUSH, 1.0)]) == by_full_passes(model, [Add(SITE, PUSH, 1.0)])
    assert hooks(model) == 0


def test_every_gate_of_somebody_elses_is_asked_about():
    model = tiny_model("llama")
    harmless, from_the_second_token = (lambda acts: acts[..., 0] > 0), (lambda acts: torch.arange(acts.shape[1]) > 0)
    assert decoding_check(model, [Add(SITE, PUSH, 1.0, harmless)]).cached
    assert not decoding_check(model, [Add(SITE, PUSH, 1.0, from_the_second_token)]).cached
    assert decoding_check(model, [Add(SITE, PUSH, 1.0, harmless)]).cached
    ran = passes(model)
    for site in (Site(0), SITE, Site(2)):  # ours are of one kind, whatever their numbers and wherever
        assert decoding_check(model, [Add(site, PUSH * site.layer, 1.0)]).cached
    assert len(ran) == 2 + 4


def test_padding_that_an_edit_spreads_is_found_where_there_is_no_cache_either():
    model = with_decoder(Deaf)
    assert decoding_check(model).padded and decoding_check(model, [Add(SITE, PUSH, 1.0)]).padded
    assert not decoding_check(model, [Centred()]).padded


def test_a_verdict_ends_with_the_state_that_it_was_about():
    model = tiny_model("llama")
    plain = decoding_check(model)
    assert decoding_check(model.bfloat16()) is not plain
    assert decoding_check(model.float()) is plain


def test_no_verdict_comes_from_running_out_of_memory(monkeypatch):
    model = tiny_model("llama")

    def no_memory(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cache_check.DecodingBatch, "begin", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        decoding_check(model)
    monkeypatch.undo()
    assert decoding_check(model).cached


def test_what_follows_other_rows_is_not_asked_about_those_of_the_check():
    model, gate = tiny_model("llama"), RowGate(torch.tensor([True, False, True]))
    ran = passes(model)
    decoding_check(model)
    ran.clear()
    assert decoding_check(model, [Add(SITE, PUSH, 1.0, gate)]).cached
    inner = RandomEdit(Add(SITE, PUSH, 1.0, gate), PUSH)
    assert decoding_check(model, [inner]).cached and not ran  # nor where the gate stands inside another edit

    class OfThreeRows(Centred):
        def __call__(self, acts):
            return acts + torch.zeros(3, 1, 1)

    assert decoding_check(model, [OfThreeRows()]).cached  # cannot be compared; `generate` says what such must keep to
    with pytest.raises(CannotTap, match="no L7"):
        decoding_check(model, [Add(Site(7), PUSH, 1.0)])


def test_readers_and_counters_do_not_see_the_check():
    model = tiny_model("llama")
    with torch.no_grad(), read_sites(model, [SITE]) as tap:
        decoding_check(model)
        assert tap.firings[SITE] == 0
        model(torch.tensor([PROMPTS[0]]))
        assert tap.firings[SITE] == 1
    fresh = tiny_model("llama")
    with fold_cosines(fresh, {SITE: PUSH[None]}):  # refuses passes whose parts it does not see one after the other
        assert decoding_check(fresh).cached


def test_models_without_numbers_and_models_that_do_not_run():
    broken = tiny_model("llama")
    broken.lm_head.weight.data.fill_(float("nan"))
    assert decoding_check(broken).cached  # no logits are right, so none can be missed
    without_norm = tiny_model("llama")
    del without_norm.model.norm
    with pytest.raises(NotTestable, match="cannot run a forward pass: AttributeError"):
        decoding_check(without_norm)
