import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from molehunt.errors import CannotTap
from molehunt.model.blocks import (
    Role,
    attn_module,
    decoder_blocks,
    final_norm,
    mlp_module,
    module_role,
    unembedding,
)
from molehunt.model.taps import read_sites
from molehunt.site import Site
from tiny_models import ARCHITECTURES, D_MODEL, N_LAYERS, VOCAB, Blocks, prompts, tiny_model, with_lora


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_blocks_and_their_parts_are_found_inside_and_outside_a_peft_wrapper(architecture, wrapped):
    model = tiny_model(architecture)
    name, expected = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    given = with_lora(model, architecture) if wrapped else model

    blocks = decoder_blocks(given)

    assert blocks is expected
    assert blocks is decoder_blocks(given, name)
    for i, block in enumerate(blocks):
        assert "Attention" in type(attn_module(block)).__name__
        assert "MLP" in type(mlp_module(block)).__name__
        assert i < N_LAYERS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_last_resid_through_final_norm_and_unembedding_gives_the_logits(architecture):
    model = tiny_model(architecture)
    last = Site(N_LAYERS - 1)
    with read_sites(model, [last]) as tap:
        logits = model(torch.tensor(prompts()[:1])).logits

    lens = unembedding(model)(final_norm(model)(tap[last]))

    torch.testing.assert_close(lens, logits)
    assert not torch.allclose(unembedding(model)(tap[last]), logits)  # so `resid` comes before the norm


class Experts(Blocks):
    """Each block holds as many experts as the model has blocks."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in self.layers)


class TwoLists(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in self.layers)


def test_lists_inside_a_block_are_not_taken_for_the_blocks():
    model = Experts()
    assert decoder_blocks(model) is model.layers


def test_two_lists_of_the_right_length_need_a_path():
    model = TwoLists()
    with pytest.raises(CannotTap, match=r"2 lists of 3 modules \(layers, norms\)[\s\S]*--layers-path"):
        decoder_blocks(model)
    assert decoder_blocks(model, "layers") is model.layers


def test_no_list_of_the_right_length_and_no_config_are_told():
    model = Blocks()
    model.layers.append(nn.Linear(8, 8))
    with pytest.raises(CannotTap, match="0 lists of 3 modules"):
        decoder_blocks(model)
    with pytest.raises(CannotTap, match="no transformers config"):
        decoder_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize("path", ["nowhere", "head", "layers.0", "config"])
def test_a_path_that_leads_to_no_list_names_the_lists_there_are(path):
    with pytest.raises(CannotTap, match=f"{path} is not a list of decoder blocks[\\s\\S]*are: layers"):
        decoder_blocks(Blocks(), path)


def test_unknown_parts_are_told_with_what_there_is():
    block = nn.Sequential()
    block.mixer = nn.Linear(2, 2)
    for find, what in ((attn_module, "attention"), (mlp_module, "MLP")):
        with pytest.raises(CannotTap, match=f"no {what}[\\s\\S]*it has mixer"):
            find(block)
    with pytest.raises(CannotTap, match="no final norm"):
        final_norm(Blocks())
    with pytest.raises(CannotTap, match="no unembedding"):
        unembedding(Blocks())


PARTS_OF = {
    "llama": ["q", "k", "v", "o", "gate", "up", "down"],
    "qwen3": ["q", "k", "v", "o", "gate", "up", "down"],
    "gemma3": ["q", "k", "v", "o", "gate", "up", "down"],
    "gpt2": ["qkv", "o", "up", "down"],
    "gpt_neox": ["qkv", "o", "up", "down"],
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_projection_has_its_role_and_nothing_else_has_one(architecture):
    model = tiny_model(architecture)
    found = {name: module_role(name, model.config.model_type) for name, _ in model.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    for layer in range(N_LAYERS):
        here = [role.part for role in found.values() if role is not None and role.layer == layer]
        assert sorted(here) == sorted(PARTS_OF[architecture])
    for name, role in found.items():
        if role is None:
            assert len(shapes[name]) == 1 or VOCAB in shapes[name] or "wpe" in name, name
            continue
        assert role.transposed == (architecture == "gpt2")
        assert role.stream == ("attn" if "attn" in name or "attention" in name else "mlp")
        assert role.writes == (role.part in ("o", "down"))
        width, reads = shapes[name][:: -1 if role.transposed else 1]
        assert (width if role.writes else reads) == D_MODEL


@pytest.mark.parametrize(
    ("name", "model_type", "role"),
    [
        ("model.layers.7.mlp.experts.3.down_proj.weight", "qwen3_moe", Role(7, "down", False)),
        ("model.layers.7.block_sparse_moe.experts.0.w2.weight", "mixtral", Role(7, "down", False)),
        ("model.layers.1.mlp.gate_up_proj.weight", "phi3", Role(1, "gate_up", False)),
        ("language_model.model.layers.2.self_attn.o_proj.weight", "gemma3", Role(2, "o", False)),
        ("h.11.attn.c_proj.weight", "gpt2", Role(11, "o", True)),
        ("transformer.h.0.attn.c_proj.weight", "gpt_bigcode", Role(0, "o", False)),
        ("model.layers.0.self_attn.q_proj", "llama", Role(0, "q", False)),
        ("model.layers.0.self_attn.q_proj.bias", "llama", None),
        ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", "gemma3", None),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", "gemma3", None),
        ("model.layers.0.mlp.gate.weight", "qwen3_moe", None),
        ("model.layers.0.mlp.o_proj.weight", "odd", None),
        ("model.layers.0.self_attn.up_proj.weight", "odd", None),
        ("lm_head.weight", "llama", None),
        ("q_proj.weight", "llama", None),
    ],
)
def test_names_of_other_families(name, model_type, role):
    assert module_role(name, model_type) == role


@given(st.text(max_size=60))
def test_any_text_is_a_name(text):
    for name in (text, f"model.layers.0.{text}", f"model.layers.{text}.self_attn.q_proj.weight"):
        role = module_role(name, text)
        assert role is None or role.layer >= 0
