"""The decoder blocks of a model, and the roles of the matrices inside them."""

import re
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from molehunt.errors import CannotTap, printable

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
FINAL_NORM = (
    "norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f", "ln_out", "out_norm",
    "embedding_norm",  # LFM2's, which is applied after its blocks
)  # fmt: skip

MIXERS = (
    "mixer", "mamba", "mamba_decoder", "linear_attn", "conv", "short_conv", "temporal_block", "mlstm_layer", "time_mixer",
)  # fmt: skip
"""Names of modules that mix positions without attention: state-space models, linear attention, convolutions."""

Part = Literal["q", "k", "v", "kv", "qkv", "o", "mix_in", "mix_out", "gate", "up", "gate_up", "down"]
ATTENTION_PARTS: tuple[Part, ...] = ("q", "k", "v", "kv", "qkv", "o")
WRITERS: tuple[Part, ...] = ("o", "mix_out", "down")
"""Parts whose rows write to the residual stream: the only ones that give directions at a site."""
PARTS: dict[str, Part] = {
    # Llama, Mistral, Qwen, Gemma, OLMo and most others
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    # Phi-3 and others that fuse; OPT, GPT-J, Phi
    "qkv_proj": "qkv", "gate_up_proj": "gate_up", "out_proj": "o",
    "fc1": "up", "fc2": "down", "fc_in": "up", "fc_out": "down",
    # GPT-2, GPT-BigCode, StarCoder2; the attention's c_proj is recognised by its parent
    "c_attn": "qkv", "c_fc": "up", "c_proj": "down",
    # GPT-NeoX, Falcon, BLOOM
    "query_key_value": "qkv", "dense": "o", "dense_h_to_4h": "up", "dense_4h_to_h": "down",
    # MPT, DBRX; DeepSeek's latent attention
    "Wqkv": "qkv", "q_a_proj": "q", "q_b_proj": "q", "kv_a_proj_with_mqa": "kv", "kv_b_proj": "kv",
    # Mixtral's experts; Granite's; xLSTM's
    "w1": "gate", "w2": "down", "w3": "up", "input_linear": "gate_up", "output_linear": "down",
    "proj_up_gate": "gate", "proj_up": "up", "proj_down": "down",
}  # fmt: skip
RWKV: dict[str, dict[str, Part]] = {
    "attention": {"receptance": "q", "key": "k", "value": "v", "output": "o"},
    "feed_forward": {"receptance": "gate", "key": "up", "value": "down"},
}
"""RWKV names its matrices alike in both modules."""
MIXING: dict[str, Part] = {
    "in_proj": "mix_in", "in_proj_qkvz": "mix_in", "in_proj_ba": "mix_in", "in_proj_qkv": "mix_in", "in_proj_z": "mix_in",
    "in_proj_b": "mix_in", "in_proj_a": "mix_in", "x_proj": "mix_in", "dt_proj": "mix_in", "linear_x": "mix_in",
    "linear_y": "mix_in", "q": "mix_in", "k": "mix_in", "v": "mix_in", "ogate_preact": "mix_in", "igate_preact": "mix_in",
    "fgate_preact": "mix_in", "q_proj": "q", "k_proj": "k", "v_proj": "v",
    "out_proj": "mix_out", "linear_out": "mix_out", "o_proj": "o",
}  # fmt: skip
"""Matrices inside `MIXERS`; RecurrentGemma calls its attention a temporal block, too."""
FUSED_EXPERTS = re.compile(r"(?P<before>.*\.(?:experts|block_sparse_moe))\.(?P<leaf>\w+?)(?P<end>(\.weight)?)")
"""A parameter that holds the matrices of all experts, one after the other."""
INPUT_FIRST_EXPERTS = frozenset({"gpt_oss", "aria", "aria_text", "llama4", "llama4_text", "openai_privacy_filter"})
"""Model types whose fused experts are stored [expert in out] where everybody else stores [expert out in]."""
STORED_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose projections are `Conv1D`: stored [in out] where everybody else stores [out in]."""
_IN_BLOCK = re.compile(r"(?P<before>(?:\w+\.)*)(?:layers|layer|h|blocks)\.(?P<layer>\d{1,6})\.(?P<path>[\w.]+)")
_NOT_DECODER = re.compile(r"(^|\.)(vision|visual|audio|speech|image|encoder|mtp)")


@dataclass(frozen=True, slots=True)
class Role:
    """The role of one weight matrix in its decoder block."""

    layer: int
    """0-based decoder block."""
    part: Part
    transposed: bool
    """Whether the matrix is stored as [in out] instead of [out in]."""

    @property
    def stream(self) -> Literal["attn", "mlp"]:
        """Stream of the module that the matrix belongs to."""
        return "attn" if self.part in ATTENTION_PARTS or self.part.startswith("mix") else "mlp"

    @property
    def writes(self) -> bool:
        """Whether the rows of the matrix (columns when transposed) write to the residual stream."""
        return self.part in WRITERS


def module_role(name: str, model_type: str) -> Role | None:
    """The role of the matrix `name` of a checkpoint; None unless it is a projection of attention, a mixer or an MLP.

    Only names are read. Biases, norms, embeddings, routers, vision and audio towers have no role; an expert's matrix has
    the role of an MLP matrix, and so has the parameter that holds the matrices of all experts.

    Args:
        name: a parameter such as `model.layers.3.mlp.down_proj.weight`, with or without the `.weight`.
        model_type: the model type in `config.json`, such as `gpt2`.
    """
    found = _IN_BLOCK.fullmatch(name.removesuffix(".weight"))
    if found is None or _NOT_DECODER.search(found["before"]):
        return None
    *parents, leaf = found["path"].split(".")
    part = _part(parents, leaf)
    if part is None:
        return None
    layer, experts = int(found["layer"]), "experts" in parents and not any(parent.isdigit() for parent in parents)
    return Role(layer, part, model_type in (INPUT_FIRST_EXPERTS if experts else STORED_TRANSPOSED))


def _part(parents: list[str], leaf: str) -> Part | None:
    """The part that a matrix plays by its own name and those of the modules around it, from the block inwards."""
    if any(parent in MIXERS for parent in parents):
        return MIXING.get(leaf)
    if leaf in RWKV["attention"] and parents and parents[0] in RWKV:
        return RWKV[parents[0]].get(leaf)
    part = PARTS.get(leaf)
    in_attention = any(parent in ATTENTION for parent in parents)
    if in_attention and part == "down":  # GPT-2 calls both of its writers c_proj
        part = "o"
    if part is None or in_attention != (part in ATTENTION_PARTS):
        return None
    return part


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return cast("nn.Module", inner()) if callable(inner) else model


def decoder(model: nn.Module) -> nn.Module:
    """The module that runs the decoder, from embeddings to final norm."""
    inner: Any = unwrapped(model)
    return inner.get_decoder() if hasattr(inner, "get_decoder") else inner


def decoder_blocks(model: nn.Module, layers_path: str | None = None) -> nn.ModuleList:
    """The decoder blocks in order.

    Args:
        model: a causal language model, with or without a PEFT wrapper.
        layers_path: the module path of the blocks inside the (unwrapped) model, such as `model.layers`, for a model
            where they cannot be found by their number.

    Raises:
        CannotTap: there is no list of blocks at `layers_path`; or, without one, none or several lists have as many
            modules as the config has layers.
    """
    inner = unwrapped(model)
    if layers_path is not None:
        try:
            blocks = inner.get_submodule(layers_path)
        except AttributeError:
            blocks = None
        if not isinstance(blocks, nn.ModuleList):
            lists = [name for name, module in inner.named_modules() if isinstance(module, nn.ModuleList)]
            raise CannotTap(
                f"{printable(layers_path)} is not a list of decoder blocks in this model.\n"
                f"Lists of modules there are: {printable(', '.join(lists) or 'none', 400)}."
            )
        return blocks
    n_layers = n_layers_of(inner)
    found: dict[str, nn.ModuleList] = {}
    for name, module in decoder(inner).named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)  # a block's own lists, such as experts
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and not nested:
            found[name] = module
    if len(found) != 1:
        raise CannotTap(
            f"{type(inner).__name__} has {len(found)} lists of {n_layers} modules "
            f"({printable(', '.join(found)) or 'none'}) where its decoder blocks should be.\n"
            "Say where they are with --layers-path, for example --layers-path model.layers."
        )
    return next(iter(found.values()))


def n_layers_of(model: nn.Module) -> int:
    """The number of decoder layers that the config states. Raises CannotTap without such a config."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise CannotTap(f"{type(model).__name__} has no transformers config, so its blocks cannot be counted.")
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def modules_named(model: nn.Module, stored: str) -> list[nn.Module]:
    """The modules that the stored name of a matrix without `.weight` may mean.

    A folder may leave out the prefixes of a model, or write them in another order: what stands from the block on counts.
    """
    found = _IN_BLOCK.fullmatch(stored)
    if found is None or _NOT_DECODER.search(found["before"]):
        return []
    wanted = (found["layer"], found["path"])
    placed = ((_IN_BLOCK.fullmatch(name), module) for name, module in unwrapped(model).named_modules())
    return [
        module
        for place, module in placed
        if place and (place["layer"], place["path"]) == wanted and not _NOT_DECODER.search(place["before"])
    ]


def d_model_of(model: nn.Module) -> int:
    """Width of the residual stream, from the config of the language model."""
    config: Any = unwrapped(model).config
    return int(config.get_text_config(decoder=True).hidden_size)


def attn_module(block: nn.Module) -> nn.Module:
    """The attention of a decoder block. Raises CannotTap when no child has a known name."""
    return _child(block, ATTENTION, "attention")


def mlp_module(block: nn.Module) -> nn.Module:
    """The MLP (or mixture of experts) of a decoder block. Raises CannotTap when no child has a known name."""
    return _child(block, MLP, "MLP")


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the unembedding. Raises CannotTap when no child has a known name."""
    return _child(decoder(model), FINAL_NORM, "final norm")


def unembedding(model: nn.Module) -> nn.Module:
    """The module that turns normed activations [.. d_model] into logits [.. vocab]. Raises CannotTap without one."""
    inner: Any = unwrapped(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None:
        raise CannotTap(f"{type(inner).__name__} has no unembedding: it is not a causal language model.")
    return head


def _child(module: nn.Module, names: tuple[str, ...], what: str) -> nn.Module:
    children = dict(module.named_children())
    for name in names:
        if name in children:
            return children[name]
    raise CannotTap(
        f"{type(module).__name__} has no {what} by a name that Molehunt knows ({', '.join(names)}); "
        f"it has {printable(', '.join(children) or 'no parts', 400)}.\nRead or edit its resid stream instead."
    )
