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

Part = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]
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
    # Mixtral's experts
    "w1": "gate", "w2": "down", "w3": "up",
}  # fmt: skip
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
        return "attn" if self.part in ("q", "k", "v", "qkv", "o") else "mlp"

    @property
    def writes(self) -> bool:
        """Whether the rows of the matrix (columns when transposed) write to the residual stream."""
        return self.part in ("o", "down")


def module_role(name: str, model_type: str) -> Role | None:
    """The role of the matrix `name` of a checkpoint; None unless it is a projection of attention or MLP.

    Only names are read. Biases, norms, embeddings, routers, vision and audio towers have no role; an expert's matrix has
    the role of an MLP matrix.

    Args:
        name: a parameter such as `model.layers.3.mlp.down_proj.weight`, with or without the `.weight`.
        model_type: the model type in `config.json`, such as `gpt2`.
    """
    found = _IN_BLOCK.fullmatch(name.removesuffix(".weight"))
    if found is None or _NOT_DECODER.search(found["before"]):
        return None
    *parents, leaf = found["path"].split(".")
    part = PARTS.get(leaf)
    if part is None:
        return None
    in_attention = bool(parents) and parents[0] in ATTENTION
    if in_attention and part == "down":  # GPT-2 calls both of its writers c_proj
        part = "o"
    if in_attention != (part in ("q", "k", "v", "qkv", "o")):
        return None
    return Role(int(found["layer"]), part, model_type in STORED_TRANSPOSED)


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
