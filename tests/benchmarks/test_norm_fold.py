"""What the fold reads is what hooks on the block outputs read: every architecture, batch, step, dtype and refusal."""

from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.functional import normalize
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.norm_fold import fold_cosines, unfoldable
from molehunt.errors import CannotTap, NotTestable
from molehunt.model.cache import left_by, with_cache
from molehunt.model.taps import edit_sites, read_sites
from molehunt.site import Site
from molehunt.steer.add import Add
from tiny_models import D_MODEL, N_LAYERS, VOCAB, Blocks, hooks, prompts, tiny_model, with_lora

SITES = [Site(layer) for layer in range(N_LAYERS)]
IDS = torch.tensor(prompts(lengths=(7, 7)))
RMS = ("llama", "qwen2", "qwen3", "gemma3")
LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def directions(ks=(4, 1, 24), seed=3):
    """Of no particular length, another number at each block's output."""
    rng = torch.Generator().manual_seed(seed)
    return {site: 5 * torch.randn(k, D_MODEL, generator=rng) for site, k in zip(SITES, ks, strict=True)}


def with_uneven_norms(model, seed=1):
    """Norm weights of both signs and several sizes: fresh models have all ones."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            sign = torch.randint(0, 2, module.weight.shape, generator=rng) * 2 - 1
            module.weight.copy_(sign * (0.05 + 2 * torch.rand(module.weight.shape, generator=rng)))
    return model


def rms_model(architecture):
    if architecture == "qwen2":
        torch.manual_seed(0)
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA_LIKE)).eval()
    else:
        model = tiny_model(architecture)
    return with_uneven_norms(model)


def plain(acts, rows):
    return normalize(acts.float(), dim=-1) @ normalize(rows, dim=-1).mT


@contextmanager
def both_ways(model, given):
    """Read by the fold and by hooks on the block outputs, in the same passes."""
    with fold_cosines(model, given) as fold, read_sites(model, given) as tap:
        yield fold, tap


@pytest.mark.parametrize("architecture", RMS)
def test_equals_normalized_block_outputs_in_a_padded_batch_and_leaves_the_logits_bit_equal(architecture):
    model, given = rms_model(architecture), directions()
    rows = prompts(lengths=(3, 9, 5))
    ids = torch.tensor([[0] * (9 - len(row)) + row for row in rows])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    logits = model(**batch).logits
    before = hooks(model)

    with both_ways(model, given) as (fold, tap):
        assert model(**batch).logits.equal(logits)

    assert hooks(model) == before
    for site, rows_at in given.items():
        assert (fold[site].shape, fold[site].dtype) == ((3, 9, len(rows_at)), torch.float32)
        torch.testing.assert_close(fold[site], plain(tap[site], rows_at), rtol=1e-5, atol=1e-6)
        assert fold[site].abs().max() > 0.1
    assert model(**batch).logits.equal(logits)


@pytest.mark.parametrize("architecture", RMS)
def test_every_cached_step_is_read(architecture):
    model, given = rms_model(architecture), directions()
    cache, tokens, steps = None, IDS, []
    with both_ways(model, given) as (fold, tap):
        for _ in range(5):
            out = model(tokens, **with_cache(model, cache))
            cache, tokens = left_by(out), out.logits[:, -1:].argmax(-1)
            for site, rows in given.items():
                torch.testing.assert_close(fold[site], plain(tap[site], rows), rtol=1e-5, atol=1e-6)
            steps.append((tokens, {site: fold[site] for site in given}))
        assert [step[SITES[0]].shape[1] for _, step in steps] == [7, 1, 1, 1, 1]
        model(torch.cat([IDS, *[tokens for tokens, _ in steps[:-1]]], dim=1))  # the same text in one pass
        for site in given:
            torch.testing.assert_close(torch.cat([step[site] for _, step in steps], 1), fold[site], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", RMS)
def test_half_precision_costs_at_most_its_epsilon(architecture, dtype):
    model, given = rms_model(architecture).to(dtype), directions()
    logits = model(IDS).logits
    with both_ways(model, given) as (fold, tap):
        assert model(IDS).logits.equal(logits)
    for site, rows in given.items():
        assert fold[site].dtype == torch.float32  # of which rounding is the norm's alone
        off = (fold[site] - plain(tap[site], rows)).abs()
        assert off.max() <= torch.finfo(dtype).eps
        assert off.mean() <= torch.finfo(dtype).eps / D_MODEL**0.5


def test_epsilon_shortens_what_is_read_by_no_more_than_is_told():
    eps = 1e-2
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_LIKE | {"initializer_range": 0.03}, rms_norm_eps=eps)).eval()
    given = directions()
    with both_ways(with_uneven_norms(model), given) as (fold, tap):
        model(IDS)
    for site, rows in given.items():
        m = tap[site].square().mean(-1, keepdim=True)
        expected = plain(tap[site], rows)
        torch.testing.assert_close(fold[site], expected * (m / (m + eps)).sqrt(), rtol=1e-4, atol=1e-6)
        lost = 1 - fold[site] / expected
        assert (lost >= 0).all()
        assert (lost <= eps / (2 * m)).all()
    assert lost.max() > 0.05  # the test is about something


def test_an_activation_of_length_0_has_cosine_0_as_in_the_plain_way():
    model, given = rms_model("llama"), directions()
    model.model.embed_tokens.weight.zero_()
    with both_ways(model, given) as (fold, tap):
        model(IDS)
    assert not tap[SITES[0]].any()
    assert not fold[SITES[0]].any()


def test_no_directions_at_a_site_are_no_columns():
    model = rms_model("llama")
    with fold_cosines(model, {Site(1): torch.zeros(0, D_MODEL)}) as fold:
        model(IDS)
    assert fold[Site(1)].shape == (2, 7, 0)


def test_a_parallel_residual_is_read_where_its_norm_is_an_rms_norm():
    model, given = tiny_model("gpt_neox"), directions()
    assert model.config.use_parallel_residual
    for block in model.gpt_neox.layers:
        block.input_layernorm = LlamaRMSNorm(D_MODEL)
    model.gpt_neox.final_layer_norm = LlamaRMSNorm(D_MODEL)
    with both_ways(with_uneven_norms(model), given) as (fold, tap):
        model(IDS)
    for site, rows in given.items():
        torch.testing.assert_close(fold[site], plain(tap[site], rows), rtol=1e-5, atol=1e-6)


class Int8(nn.Module):
    """A projection that holds no float weight which rows could be appended to."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("scale", linear.weight.abs().max() / 127)
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.weight * self.scale).mT


def test_quantised_and_adapted_projections_are_not_touched():
    given = directions()
    quantised = rms_model("llama")
    for block in quantised.model.layers:
        block.self_attn.q_proj = Int8(block.self_attn.q_proj)
    for model in (quantised, with_lora(rms_model("llama"), "llama")):
        logits = model(IDS).logits
        with both_ways(model, given) as (fold, tap):
            assert model(IDS).logits.equal(logits)
        for site, rows in given.items():
            torch.testing.assert_close(fold[site], plain(tap[site], rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_is_refused_by_name_at_every_site(architecture, dtype):
    model = tiny_model(architecture).to(dtype)
    assert set(unfoldable(model, SITES)) == set(SITES)
    with (
        pytest.raises(NotTestable, match=r"L0\.resid: LayerNorm does more than .*centres(.|\n)*L2\.resid: LayerNorm"),
        fold_cosines(model, directions()),
    ):
        pass
    assert hooks(model) == 0


def test_a_norm_with_a_bias_or_without_a_weight_is_refused():
    class Biased(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 0.1

    class Bare(nn.Module):
        def forward(self, x):
            return x * x.square().mean(-1, keepdim=True).rsqrt()

    model = rms_model("llama")
    model.model.layers[1].input_layernorm = Biased(D_MODEL)
    model.model.layers[2].input_layernorm = Bare()
    reasons = unfoldable(model, SITES)
    assert set(reasons) == {Site(0), Site(1)}
    assert "Biased does more than" in reasons[Site(0)]
    assert "Bare has no weights" in reasons[Site(1)]


def test_only_sites_whose_norm_loses_a_dimension_are_refused():
    model = rms_model("llama").half()
    model.model.layers[1].input_layernorm.weight[3] = 0
    model.model.norm.weight[:2] = 2e-5  # what is normed is then multiplied into numbers that fp16 holds badly
    reasons = unfoldable(model, SITES)
    assert set(reasons) == {Site(0), Site(2)}
    assert "LlamaRMSNorm multiplies 1 of 32 dimensions by 0, or by less than float16 can carry" in reasons[Site(0)]
    assert "2 of 32" in reasons[Site(2)]
    with (
        pytest.raises(NotTestable, match=r"^L0\.resid: LlamaRMSNorm multiplies 1 of"),
        fold_cosines(model, directions()),
    ):
        pass
    assert unfoldable(model.float(), SITES).keys() == {Site(0)}  # 2e-5 is no small number there
    given = {site: rows for site, rows in directions().items() if site != Site(0)}
    with both_ways(model, given) as (fold, tap):
        model(IDS)
    for site, rows in given.items():
        torch.testing.assert_close(fold[site], plain(tap[site], rows), rtol=1e-5, atol=1e-6)


def test_gemmas_weight_of_minus_1_is_a_g_of_0():
    model = rms_model("gemma3")
    model.model.layers[2].input_layernorm.weight[5] = -1
    assert set(unfoldable(model, SITES)) == {Site(1)}
    model.model.layers[2].input_layernorm.weight[5] = 0
    assert unfoldable(model, SITES) == {}


def test_other_streams_other_layers_and_other_widths_are_refused():
    model = rms_model("llama")
    reasons = unfoldable(model, [Site(0, "attn"), Site(1, "mlp"), Site(1), Site(3)])
    assert set(reasons) == {Site(0, "attn"), Site(1, "mlp"), Site(3)}
    assert "resid" in reasons[Site(0, "attn")]
    assert "the model has 3 blocks" in reasons[Site(3)]
    wide = {Site(0): torch.randn(2, D_MODEL), Site(1): torch.randn(2, 2 * D_MODEL)}
    with (
        pytest.raises(NotTestable, match=r"L1\.resid: the directions have width 64, and the model 32"),
        fold_cosines(model, wide),
    ):
        pass
    assert hooks(model) == 0


def test_blocks_that_norm_what_they_put_out_can_be_read_at_the_last_alone():
    torch.manual_seed(0)
    model = with_uneven_norms(hf.Olmo2ForCausalLM(hf.Olmo2Config(**LLAMA_LIKE)).eval())
    reasons = unfoldable(model, SITES)
    assert set(reasons) == {Site(0), Site(1)}
    assert "no norm on its input" in reasons[Site(0)]
    assert "post_attention_layernorm" in reasons[Site(0)]
    given = {Site(2): directions()[Site(2)]}
    with both_ways(model, given) as (fold, tap):
        model(IDS)
    torch.testing.assert_close(fold[Site(2)], plain(tap[Site(2)], given[Site(2)]), rtol=1e-5, atol=1e-6)


def test_an_edit_outside_is_seen_and_one_inside_is_refused():
    model, given = rms_model("llama"), directions()
    edit = Add(Site(1), torch.ones(D_MODEL), 3.0)
    with edit_sites(model, [edit]), both_ways(model, given) as (fold, tap):
        model(IDS)
        for site, rows in given.items():
            torch.testing.assert_close(fold[site], plain(tap[site], rows), rtol=1e-5, atol=1e-6)
    reasons = pytest.raises(CannotTap, match=r"after L1\.resid is not read by the norm")
    with fold_cosines(model, given), edit_sites(model, [edit]), reasons:
        model(IDS)
    assert hooks(model) == 0
    elsewhere = {site: rows for site, rows in given.items() if site != edit.site}
    with fold_cosines(model, elsewhere) as fold, edit_sites(model, [edit]), read_sites(model, elsewhere) as tap:
        model(IDS)
    torch.testing.assert_close(fold[Site(2)], plain(tap[Site(2)], given[Site(2)]), rtol=1e-5, atol=1e-6)


class Scaled(Blocks):
    """Blocks with a norm on their input, and something done to what goes from one to the next."""

    class Block(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.input_layernorm, self.inner = LlamaRMSNorm(8), inner

        def forward(self, x):
            return x + self.inner(self.input_layernorm(x))

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Block(layer) for layer in self.layers)

    def run(self, layer, x):
        return layer(2 * x)


class Unheard(Scaled):
    """Its blocks compute their norm without calling it."""

    class Block(Scaled.Block):
        def forward(self, x):
            return x + self.inner(self.input_layernorm.forward(x))

    def run(self, layer, x):
        return layer(x)


class ByName(Unheard):
    class Block(Scaled.Block):
        def forward(self, x):
            return x + self.inner(self.input_layernorm(hidden_states=x))


def test_a_norm_that_reads_something_else_or_is_not_called_is_noticed():
    given = {Site(0): torch.randn(2, 8), Site(1): torch.randn(2, 8)}
    for model in (Scaled(), ByName()):
        with fold_cosines(model, given), pytest.raises(CannotTap, match=r"after L0\.resid is not read by the norm"):
            model(IDS)
    model = Unheard()
    with fold_cosines(model, given) as fold:
        model(IDS)
    with pytest.raises(CannotTap, match=r"no forward pass has reached the norm after L0\.resid"):
        fold[Site(0)]
    assert "no final norm by a name" in unfoldable(model, [Site(2)])[Site(2)]


def test_what_a_stopped_pass_did_not_reach_is_not_what_the_pass_before_left():
    model, given = rms_model("llama"), directions()
    with fold_cosines(model, given) as fold:
        model(IDS)
        first = fold[Site(0)]
        with read_sites(model, [Site(1)], stop_early=True):
            model(IDS.flip(0))
        torch.testing.assert_close(fold[Site(0)], first.flip(0))
        with pytest.raises(CannotTap, match=r"no forward pass has reached the norm after L1\.resid"):
            fold[Site(1)]


def test_before_a_pass_and_at_a_site_not_asked_for_there_is_nothing_to_read():
    with fold_cosines(rms_model("llama"), {Site(1): torch.randn(2, D_MODEL)}) as fold:
        with pytest.raises(CannotTap, match=r"no forward pass has reached the norm after L1\.resid"):
            fold[Site(1)]
        with pytest.raises(KeyError, match=r"L0\.resid was not asked for; asked for: L1\.resid"):
            fold[Site(0)]


def test_compiled_models_are_refused():
    model = torch.compile(rms_model("llama"))
    with pytest.raises(CannotTap, match="compiled"), fold_cosines(model, directions()):
        pass


@pytest.mark.parametrize("where", ["body", "pass"])
def test_hooks_are_gone_after_an_exception(where):
    model = rms_model("llama")
    with (
        pytest.raises(ZeroDivisionError if where == "body" else IndexError),
        fold_cosines(model, directions()),
    ):
        assert hooks(model) > 0
        model(IDS if where == "body" else IDS + 10_000)  # no such token
        raise ZeroDivisionError
    assert hooks(model) == 0


def test_one_inside_another_reads_the_same_and_probes_reach_no_hook():
    model, given = rms_model("llama"), directions()
    with (
        fold_cosines(model, given) as outer,
        fold_cosines(model, directions(seed=4)) as inner,
        fold_cosines(model, given) as same,
    ):
        model(IDS)
    for site in given:
        assert outer[site].equal(same[site])
        assert not torch.allclose(outer[site], inner[site], atol=0.1)


def test_blocks_can_be_named_by_their_path():
    model, given = rms_model("llama"), directions()
    with pytest.raises(CannotTap, match="nowhere"):
        unfoldable(model, given, layers_path="nowhere")
    with pytest.raises(CannotTap, match="nowhere"), fold_cosines(model, given, layers_path="nowhere"):
        pass
    with fold_cosines(model, given, layers_path="model.layers") as fold:
        model(IDS)
    assert fold[Site(1)].shape == (2, 7, 1)


def test_gradients_flow():
    model, rows = rms_model("llama"), torch.randn(2, D_MODEL)
    with torch.enable_grad():
        step = torch.zeros(D_MODEL, requires_grad=True)
        with edit_sites(model, [Add(Site(0), step, 1.0)]), fold_cosines(model, {Site(1): rows}) as fold:
            model(IDS)
        (gradient,) = torch.autograd.grad(fold[Site(1)].sum(), step)
    assert gradient.abs().max() > 0
