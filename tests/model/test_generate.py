import pytest
import torch
from transformers import LlamaForCausalLM

from molehunt.errors import CannotTap
from molehunt.model.cache import with_cache
from molehunt.model.cache_check import decoding_check
from molehunt.model.generate import generate
from molehunt.model.taps import edit_sites, read_sites
from molehunt.site import STREAMS, Site
from molehunt.steer.add import Add
from molehunt.steer.clip import Clip
from tiny_models import ARCHITECTURES, hooks, prompts, tiny_model, tiny_tokenizer, with_lora

PROMPTS = prompts(lengths=(3, 9, 5, 17, 17, 1, 12))


def own_generate(model, prompt, n, **options):
    out = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=n, **options)
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def without_cache(model, prompt, n, stop):
    """Each token from a full pass over everything before it."""
    row = list(prompt)
    for _ in range(n):
        row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        if row[-1] in stop:
            break
    return row[len(prompt) :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [4, 64])
def test_equals_the_models_own_greedy_text_token_for_token(architecture, batch_size):
    model = tiny_model(architecture)
    ours = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=20, batch_size=batch_size)
    own = [own_generate(model, prompt, 20) for prompt in PROMPTS]
    assert ours == own
    assert len({len(row) for row in own}) > 1 or architecture == "gpt_neox"  # some rows stop before others
    assert len({token for row in own for token in row}) > 5


def edits_at_three_sites():
    """Edits that depend on the activations they meet: a lost, doubled or shifted step changes the text."""
    rng = torch.Generator().manual_seed(5)
    direction = torch.nn.functional.normalize(torch.randn(2, 32, generator=rng), dim=-1)
    bounds = torch.tensor([0.3, 0.2])

    def gate(acts):
        return acts[..., 0] > 0

    return [
        Clip(Site(0), direction, lo=-bounds, hi=bounds),
        Add(Site(0), direction[0], 1.5, gate=gate),
        Add(Site(1, "attn"), direction[1], 2.0, gate=gate),
        Clip(Site(2, "mlp"), direction, lo=-bounds, hi=bounds),
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_interventions_act_at_every_cached_step_as_in_a_full_recompute(architecture):
    model = tiny_model(architecture)
    edits = edits_at_three_sites()
    rows = PROMPTS[:4]
    before = hooks(model)

    cached = generate(model, tiny_tokenizer(), rows, max_new_tokens=10, interventions=edits)

    assert hooks(model) == before
    with edit_sites(model, edits):
        assert cached == [without_cache(model, prompt, 10, {2}) for prompt in rows]
        assert cached == [own_generate(model, prompt, 10) for prompt in rows]


def test_each_of_several_interventions_changes_the_text():
    model = tiny_model("llama")
    edits = edits_at_three_sites()
    every = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=10, interventions=edits)
    for left_out in edits:
        fewer = [edit for edit in edits if edit is not left_out]
        assert every != generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=10, interventions=fewer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_of_each_cached_step_equal_those_of_one_full_pass(architecture):
    model = tiny_model(architecture)
    edits = edits_at_three_sites()
    prompt = PROMPTS[3]
    sites = [Site(layer, stream) for layer in range(3) for stream in STREAMS]
    steps = {site: [] for site in sites}

    class Recording:
        def __init__(self, site):
            self.site = site

        def __call__(self, acts):
            steps[self.site].append(acts.clone())
            return acts

    recorders = [Recording(site) for site in sites]
    decoding_check(model, [*edits, *recorders])  # looks at each kind of intervention once
    for seen in steps.values():
        seen.clear()
    completion = generate(
        model, tiny_tokenizer(), [prompt], max_new_tokens=8, interventions=[*edits, *recorders], stop=()
    )[0]

    with torch.no_grad(), edit_sites(model, edits), read_sites(model, sites) as tap:
        model(torch.tensor([[*prompt, *completion[:-1]]]))
    for site in sites:
        assert [acts.shape[1] for acts in steps[site]] == [len(prompt)] + [1] * 7
        torch.testing.assert_close(torch.cat(steps[site], dim=1), tap[site], rtol=1e-4, atol=1e-4)


def test_works_inside_a_peft_wrapper():
    model = with_lora(tiny_model("llama"), "llama")
    ours = generate(model, tiny_tokenizer(), PROMPTS[:4], max_new_tokens=8)
    assert ours == [own_generate(model, prompt, 8) for prompt in PROMPTS[:4]]
    with model.disable_adapter():
        base = generate(model, tiny_tokenizer(), PROMPTS[:4], max_new_tokens=8)
    assert base == generate(tiny_model("llama"), tiny_tokenizer(), PROMPTS[:4], max_new_tokens=8) != ours


class AllLogits(LlamaForCausalLM):
    """A model that cannot be asked for the last position's logits alone."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None):
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            **(with_cache(tiny_model("llama"), cache) if use_cache else {"use_cache": False}),
        )


def test_a_model_that_always_gives_all_logits():
    plain = tiny_model("llama")
    model = AllLogits(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    ours = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=8)
    assert ours == generate(plain, tiny_tokenizer(), PROMPTS, max_new_tokens=8)


def test_stop_tokens_come_from_the_argument_the_generation_config_or_the_tokenizer():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    endless = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=12, stop=())[0]
    assert len(endless) == 12
    third = endless[2]
    until_third = endless[: endless.index(third) + 1]

    assert generate(model, tokenizer, PROMPTS[:1], max_new_tokens=12, stop={third})[0] == until_third
    model.generation_config.eos_token_id = [90, third]
    assert generate(model, tokenizer, PROMPTS[:1], max_new_tokens=12)[0] == until_third
    model.generation_config.eos_token_id = third
    assert generate(model, tokenizer, PROMPTS[:1], max_new_tokens=12)[0] == until_third


def test_the_tokenizers_stop_token_serves_where_the_model_names_none(monkeypatch):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    endless = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=12, stop=())[0]
    monkeypatch.setattr(type(tokenizer), "eos_token_id", endless[2], raising=False)
    assert generate(model, tokenizer, PROMPTS[:1], max_new_tokens=12)[0] == endless[: endless.index(endless[2]) + 1]
    monkeypatch.setattr(type(tokenizer), "eos_token_id", None, raising=False)
    assert generate(model, tokenizer, PROMPTS[:1], max_new_tokens=12)[0] == endless


def test_progress_nothing_to_do_and_empty_prompts():
    model = tiny_model("llama")
    shown = []

    def track(items, what, total=None):
        shown.append((what, total))
        return items

    generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=1, batch_size=3, track=track, what="judging")
    assert shown == [("judging", len(PROMPTS))]
    assert generate(model, tiny_tokenizer(), [], max_new_tokens=4) == []
    assert generate(model, tiny_tokenizer(), PROMPTS[:1], max_new_tokens=0) == [[]]
    with pytest.raises(ValueError, match="without tokens"):
        generate(model, tiny_tokenizer(), [[3], []], max_new_tokens=4)


def test_blocks_can_be_named_by_their_path():
    model = tiny_model("llama")
    edit = Add(Site(0), torch.ones(32), 5.0)
    with pytest.raises(CannotTap, match="nowhere"):
        generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=2, interventions=[edit], layers_path="nowhere")


def test_rows_that_stopped_cost_nothing_more():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    rows = []
    decoding_check(model)
    model.model.layers[0].register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[0]))
    completions = generate(model, tokenizer, PROMPTS, max_new_tokens=25)
    expected = [sum(len(c) > step for c in completions) for step in range(25)]
    assert rows == [n for n in expected if n]


@pytest.mark.parametrize("stop", [None, ()])
def test_progress_counts_rows_and_moves_within_a_batch(stop):
    model, taken, steps = tiny_model("llama"), [], []

    def track(items, what, total=None):
        for item in items:
            taken.append(len(steps))  # items are asked for as rows are done
            yield item

    decoding_check(model)
    model.model.layers[0].register_forward_pre_hook(lambda module, args: steps.append(args[0].shape[0]))
    generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=25, stop=stop, track=track)
    assert len(taken) == len(PROMPTS)  # the first item is under way from the beginning, and the last ends the track
    assert taken == sorted(taken) and len(set(taken)) > 3
