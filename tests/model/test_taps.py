import copy

import pytest
import torch

from molehunt.errors import CannotTap
from molehunt.model.blocks import attn_module, decoder_blocks, mlp_module
from molehunt.model.taps import edit_sites, read_sites
from molehunt.site import STREAMS, Site
from molehunt.steer.add import Add
from molehunt.steer.clip import Clip
from molehunt.steer.replace import Replace
from tiny_models import ARCHITECTURES, N_LAYERS, Blocks, hooks, prompts, tiny_model, with_lora

ALL_SITES = [Site(layer, stream) for layer in range(N_LAYERS) for stream in STREAMS]
IDS = torch.tensor(prompts(lengths=(7, 7)))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_site_fires_once_a_pass_and_holds_what_its_module_returned(architecture):
    model = tiny_model(architecture)
    expected = model(IDS, output_hidden_states=True).hidden_states
    returned = {}
    for layer, block in enumerate(decoder_blocks(model)):
        for stream, module in (("attn", attn_module(block)), ("mlp", mlp_module(block))):
            site = Site(layer, stream)
            module.register_forward_hook(lambda m, a, out, site=site: returned.update({site: out}))
    before = hooks(model)

    with read_sites(model, ALL_SITES) as tap:
        model(IDS[:, :3])
        logits = model(IDS).logits

    assert dict(tap.firings) == dict.fromkeys(ALL_SITES, 2)
    assert hooks(model) == before
    assert logits.equal(model(IDS).logits)
    for layer in range(N_LAYERS - 1):  # the last entry of hidden_states comes after the final norm
        assert tap[Site(layer)].equal(expected[layer + 1])
    assert not torch.allclose(tap[Site(N_LAYERS - 1)], expected[N_LAYERS])
    for site, out in returned.items():
        assert tap[site].equal(out[0] if isinstance(out, tuple) else out)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_patching_a_site_with_its_own_activation_leaves_the_logits_bit_equal(architecture):
    model = tiny_model(architecture)
    with read_sites(model, ALL_SITES) as tap:
        plain = model(IDS).logits
    for site in ALL_SITES:
        with edit_sites(model, [Replace(site, tap[site])]) as edits:
            patched = model(IDS).logits
        assert edits.firings[site] == 1
        assert patched.equal(plain), site
        with edit_sites(model, [Replace(site, tap[site] + 1)]):
            assert not torch.allclose(model(IDS).logits, plain), site  # the edit is really in the path


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sites_of_an_adapted_model_can_be_read_and_edited(architecture):
    model = with_lora(tiny_model(architecture), architecture)
    with read_sites(model, ALL_SITES) as tap:
        plain = model(IDS).logits
    assert dict(tap.firings) == dict.fromkeys(ALL_SITES, 1)
    with edit_sites(model, [Replace(site, tap[site]) for site in ALL_SITES]):
        assert model(IDS).logits.equal(plain)


class Tuples(Blocks):
    """Blocks that return (activations, something else), as older models' do."""

    class Block(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x), "weights"

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(self.Block(layer) for layer in self.layers)

    def run(self, layer, x):
        acts, weights = layer(x)
        assert weights == "weights"
        return acts


def test_blocks_that_return_tuples_are_read_and_edited_alike():
    plain, tuples = Blocks(), Tuples()
    edit = Add(Site(1), torch.randn(8), 2.0)
    seen = []
    for model in (plain, tuples):
        with edit_sites(model, [edit]), read_sites(model, [Site(1)]) as tap:
            seen.append((model(IDS), tap[Site(1)]))
    assert seen[0][0].equal(seen[1][0])
    assert seen[0][1].equal(seen[1][1])
    assert not seen[0][0].equal(plain(IDS))


class InPlace(Blocks):
    def run(self, layer, x):
        return layer(x).add_(1)


def test_a_later_sum_in_place_does_not_change_what_was_read():
    model = InPlace()
    with read_sites(model, [Site(0)]) as tap:
        model(IDS)
    assert tap[Site(0)].equal(model.layers[0](model.embed(IDS)))


class Bypassing(Blocks):
    def run(self, layer, x):
        return layer.forward(x)


class ForwardOnly(torch.nn.Module):
    """As some wrappers do: the model's `forward` is called, and not the model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_decoder(self):
        return self.model

    def forward(self, ids):
        return self.model.forward(ids)


@pytest.mark.parametrize("model", [Bypassing(), ForwardOnly(Bypassing())])
def test_a_model_that_does_not_call_its_blocks_is_refused(model):
    before = hooks(model)
    with pytest.raises(CannotTap, match=r"L1\.resid was called 0 times in 1 forward"), read_sites(model, [Site(1)]):
        model(IDS)
    with pytest.raises(CannotTap, match="0 times"), read_sites(model, [Site(1)], stop_early=True):
        model(IDS)
    edit = Add(Site(1), torch.ones(8), 1.0)
    with pytest.raises(CannotTap, match="0 times"), edit_sites(model, [edit]):
        model(IDS)
    assert hooks(model) == before


def test_a_pass_that_starts_inside_a_wrapper_counts():
    """PEFT's `generate` calls the model inside and never the wrapper."""
    wrapper = ForwardOnly(Bypassing())
    with pytest.raises(CannotTap, match="0 times in 1 forward"), read_sites(wrapper, [Site(1)]):
        wrapper.model(IDS)


def test_a_hook_that_goes_silent_after_the_first_pass_is_noticed():
    class Replayed(Blocks):
        passes = 0

        def forward(self, input_ids):
            self.passes += 1
            return super().forward(input_ids) if self.passes == 1 else torch.zeros(1)

    model = Replayed()
    with pytest.raises(CannotTap, match="1 times in 2 forward passes"), read_sites(model, [Site(0)]):
        model(IDS)
        model(IDS)


def test_compiled_models_are_refused():
    whole, inside, in_place = Blocks(), Blocks(), Blocks()
    inside.layers[1] = torch.compile(inside.layers[1])
    in_place.layers[2].compile()
    for model in (torch.compile(whole), inside, in_place):
        with pytest.raises(CannotTap, match="compiled"), read_sites(model, [Site(0)]):
            pass
        with pytest.raises(CannotTap, match="compiled"), edit_sites(model, [Add(Site(0), torch.ones(8), 1.0)]):
            pass


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stream", STREAMS)
def test_early_stop_reads_the_same_and_runs_no_later_block(architecture, stream):
    model = tiny_model(architecture)
    sites = [Site(1, stream), Site(0), Site(0, "mlp")]
    with read_sites(model, sites) as full:
        model(IDS)
    ran = []
    for layer, block in enumerate(decoder_blocks(model)):
        block.register_forward_pre_hook(lambda m, a, layer=layer: ran.append(layer))
    before = hooks(model)

    after_the_pass = False
    with read_sites(model, sites, stop_early=True) as tap:
        model(IDS)
        after_the_pass = True

    assert ran == [0, 1]
    assert not after_the_pass
    assert hooks(model) == before
    for site in sites:
        assert tap[site].equal(full[site])


def test_early_stop_at_all_streams_of_a_block_waits_for_its_output():
    model = tiny_model("llama")
    with read_sites(model, [Site(0), Site(0, "attn"), Site(0, "mlp")], stop_early=True) as tap:
        model(IDS)
    assert all(tap.firings[Site(0, stream)] == 1 for stream in STREAMS)


def test_parallel_attention_and_mlp_are_both_read_before_an_early_stop():
    model = tiny_model("gpt_neox")  # parallel residual
    sites = [Site(1, "mlp"), Site(1, "attn")]
    with read_sites(model, sites, stop_early=True) as tap:
        model(IDS)
    assert [tap.firings[site] for site in sites] == [1, 1]


def test_an_inner_early_stop_ends_only_its_own_block():
    model = tiny_model("llama")
    reached = False
    with read_sites(model, [Site(0)]) as outer:
        with read_sites(model, [Site(1)], stop_early=True) as inner:
            model(IDS)
        reached = True
    assert reached
    assert outer.firings[Site(0)] == inner.firings[Site(1)] == 1

    reached = False
    with read_sites(model, [Site(0)], stop_early=True) as outer:
        with read_sites(model, [Site(1)], stop_early=True) as inner:
            model(IDS)
        reached = True
    assert not reached
    assert outer.firings[Site(0)] == 1
    with pytest.raises(CannotTap, match=r"no forward pass of this model has reached L1\.resid"):
        inner[Site(1)]


@pytest.mark.parametrize("where", ["body", "block", "intervention"])
def test_hooks_are_gone_after_an_exception(where):
    class Failing:
        site = Site(1)

        def __call__(self, acts):
            raise ZeroDivisionError

    model = tiny_model("llama")
    before = hooks(model)
    edit = Failing() if where == "intervention" else Add(Site(1), torch.ones(32), 1.0)
    ids = IDS + 10_000 if where == "block" else IDS  # no such token
    with (
        pytest.raises(ZeroDivisionError if where != "block" else IndexError),
        read_sites(model, ALL_SITES),
        edit_sites(model, [edit]),
    ):
        model(ids)
        raise ZeroDivisionError
    assert hooks(model) == before


def test_hooks_are_gone_when_a_site_does_not_exist():
    model = tiny_model("llama")
    with pytest.raises(CannotTap, match=r"no L3\.resid: the model has 3 blocks"), read_sites(model, [Site(0), Site(3)]):
        pass
    assert hooks(model) == 0


def test_interventions_at_one_site_act_in_the_order_given():
    model = tiny_model("llama")
    direction = torch.nn.functional.one_hot(torch.tensor(3), 32).float()
    site = Site(1)
    add = Add(site, direction, 50.0)
    clip = Clip(site, direction[None], lo=torch.tensor([-1.0]), hi=torch.tensor([1.0]))
    seen = []
    for interventions in ([add, clip], [clip, add]):
        with edit_sites(model, interventions) as edits, read_sites(model, [site]) as tap:
            model(IDS)
        seen.append(tap[site][..., 3])
        assert edits.firings[site] == 1
    assert float(seen[0].max()) <= 1.001
    assert float(seen[1].min()) >= 48.9


def test_a_read_before_an_edit_sees_the_activations_as_they_were():
    model = tiny_model("llama")
    edit = Add(Site(1), torch.ones(32), 5.0)
    with read_sites(model, [Site(1)]) as outside, edit_sites(model, [edit]), read_sites(model, [Site(1)]) as inside:
        model(IDS)
    torch.testing.assert_close(inside[Site(1)], outside[Site(1)] + 5)


@pytest.mark.parametrize("spoil", [lambda a: a[:, :1], lambda a: a.double()])
def test_an_intervention_that_changes_shape_or_dtype_is_told(spoil):
    class Spoiling:
        site = Site(0)

        def __call__(self, acts):
            return spoil(acts)

    model = Blocks()
    with pytest.raises(ValueError, match=r"Spoiling at L0\.resid turned"), edit_sites(model, [Spoiling()]):
        model(IDS)


class Dicts(Blocks):
    class Block(torch.nn.Module):
        def forward(self, x):
            return {"acts": x}

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(self.Block() for _ in self.layers)

    def run(self, layer, x):
        return layer(x)["acts"]


def test_a_block_that_returns_no_activations_is_told():
    model = Dicts()
    with pytest.raises(CannotTap, match=r"returned dict, not activations"), read_sites(model, [Site(0)]):
        model(IDS)


def test_what_was_not_asked_for_or_not_reached_is_an_error():
    model = tiny_model("llama")
    with read_sites(model, [Site(0)]) as tap:
        with pytest.raises(CannotTap, match="no forward pass"):
            tap[Site(0)]
        model(IDS)
    with pytest.raises(KeyError, match=r"L1\.resid was not asked for; asked for: L0\.resid"):
        tap[Site(1)]


def test_blocks_can_be_named_by_their_path():
    class Two(Blocks):
        def __init__(self):
            super().__init__()
            self.other = copy.deepcopy(self.layers)

    model = Two()
    with pytest.raises(CannotTap, match="--layers-path"), read_sites(model, [Site(0)]):
        pass
    with read_sites(model, [Site(0)], layers_path="layers") as tap:
        model(IDS)
    assert tap.firings[Site(0)] == 1
    edit = Add(Site(0), torch.ones(8), 1.0)
    with edit_sites(model, [edit], layers_path="layers") as edits:
        model(IDS)
    assert edits.firings[Site(0)] == 1


def test_gradients_flow_through_reads_and_edits():
    model = tiny_model("llama")
    with torch.enable_grad():
        step = torch.zeros(32, requires_grad=True)
        with edit_sites(model, [Add(Site(0), step, 1.0)]), read_sites(model, [Site(1)]) as tap:
            model(IDS)
        (gradient,) = torch.autograd.grad(tap[Site(1)].square().sum(), step)
    assert float(gradient.abs().max()) > 0
