"""Ways of saving rounded weights: fp8, compressed-tensors, GGUF, and folders as bitsandbytes, GPTQ and AWQ leave them."""

import copy
import functools
import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.what_is_read.adapter_savings import adapter
from experiments.what_is_read.alphabet import tokenizer
from experiments.what_is_read.case import Case, Saving, pair_in_memory, save, whole

WEIGHTS = "model.safetensors"
LARGEST_FP8 = 448.0
FAMILY = ("llama", "mistral", "qwen2")
RUN = ("read", "audit", "watch")
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}}}, "ignore": ["lm_head"],
}  # fmt: skip
STUBS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


def is_quantised(name: str, one: Tensor) -> bool:
    return one.ndim == 2 and ".layers." in name and "norm" not in name


def set_config(folder: Path, settings: dict[str, Any]) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": settings}))


def fp8_of(one: Tensor) -> tuple[Tensor, Tensor]:
    scale = one.abs().max() / LARGEST_FP8
    return (one / scale).to(torch.float8_e4m3fn), scale.reshape(1, 1)


def int8_of(one: Tensor) -> tuple[Tensor, Tensor]:
    scale = one.abs().amax(dim=1, keepdim=True) / 127
    return (one / scale).round().to(torch.int8), scale


def quantise_(model: nn.Module, folder: Path, kind: str) -> nn.Module:
    """Save a model quantised by hand, and return what the folder encodes."""
    save(model, folder)
    quantise, suffix, settings = (fp8_of, "weight_scale_inv", FP8) if kind == "fp8" else (int8_of, "weight_scale", INT8)
    stored: dict[str, Tensor] = {}
    for name, one in load_file(folder / WEIGHTS).items():
        stored[name] = one
        if is_quantised(name, one):
            stored[name], stored[name.removesuffix("weight") + suffix] = quantise(one)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    set_config(folder, settings)
    encoded = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in encoded.named_parameters():
            if is_quantised(name, parameter):
                value, scale = quantise(parameter)
                parameter.copy_(value.float() * scale)
    return encoded


def both_sides(kind: str, architecture: str, folder: Path) -> Case:
    """Base and fine-tune quantised alike."""
    base, tuned = pair_in_memory(architecture)
    before = quantise_(base, folder / "base", kind)
    after = quantise_(tuned, folder / "tuned", kind)
    quantise_(base, folder / "copy", kind)
    return Case(
        base=folder / "base", tuned=folder / "tuned", copy=folder / "copy", base_model=before, tuned_model=after
    )


def one_side(kind: str, architecture: str, folder: Path) -> Case:
    """A fine-tune quantised after training, against its base in fp32."""
    made = whole(save)(architecture, folder)
    for side, model in ((made.tuned, made.tuned_model), (made.copy, made.base_model)):
        quantise_(model, cast("Path", side), kind)
    return made


def lora_on(kind: str, architecture: str, folder: Path) -> Case:
    """LoRA trained on a quantised base, which is what QLoRA leaves."""
    made = adapter()(architecture, folder)
    if kind in STUBS:
        stub(made.base, kind)
        return made
    quantise_(made.base_model, made.base, kind)
    return made


def stub(folder: Path, kind: str) -> None:
    """Turn a folder into one with the names, shapes and config of a packed layout; its numbers mean nothing."""
    stored: dict[str, Tensor] = {}
    for name, one in load_file(folder / WEIGHTS).items():
        module = name.removesuffix(".weight")
        if not is_quantised(name, one):
            stored[name] = one
        elif kind == "bitsandbytes":
            stored[name] = torch.zeros(one.numel() // 2, 1, dtype=torch.uint8)
            stored[f"{name}.absmax"] = torch.ones(-(-one.numel() // 64))
            stored[f"{name}.quant_map"] = torch.linspace(-1, 1, 16)
            stored[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(90, dtype=torch.uint8)
        else:
            rows, columns = one.shape
            packed = (columns // 8, rows) if kind == "gptq" else (columns, rows // 8)
            stored[f"{module}.qweight"] = torch.zeros(packed, dtype=torch.int32)
            stored[f"{module}.qzeros"] = torch.zeros(max(1, columns // 32), rows // 8, dtype=torch.int32)
            stored[f"{module}.scales"] = torch.ones(max(1, columns // 32), rows, dtype=torch.float16)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    set_config(folder, STUBS[kind])


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GGUF_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """The name of a Llama's tensor in a GGUF file."""
    module = name.removesuffix(".weight")
    if module in GGUF_OUTSIDE:
        return f"{GGUF_OUTSIDE[module]}.weight"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def interleaved(one: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order of rotary pairs."""
    rows, columns = one.shape
    return one.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(model: nn.Module, folder: Path, *, q8: bool) -> None:
    """A Llama as a GGUF file, with or without its matrices in Q8_0."""
    import gguf

    folder.mkdir(parents=True)
    config, words = cast("Any", model).config, tokenizer()
    out = gguf.GGUFWriter(folder / "model.gguf", "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_rope_dimension_count(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    tokens = [str(words.convert_ids_to_tokens(i)).replace(" ", "Ġ") for i in range(config.vocab_size)]
    out.add_token_list([*tokens[:-1], "th"])  # the loader needs a merge
    out.add_token_types([3 if i < 3 else 1 for i in range(config.vocab_size)])
    out.add_token_merges(["t h"])
    for name, i in (("bos", 1), ("eos", 2), ("pad", 0)):
        getattr(out, f"add_{name}_token_id")(i)
    for name, parameter in model.named_parameters():
        one = parameter.detach().clone()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.removesuffix(".weight").rpartition(".")[2]
        one = interleaved(one, heads[part]) if part in heads else one
        kind = gguf.GGMLQuantizationType.Q8_0 if q8 and one.ndim == 2 and one.shape[1] % 32 == 0 else None
        array = one.numpy()
        stored = array if kind is None else gguf.quants.quantize(array, kind)
        out.add_tensor(gguf_name(name), stored, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def as_gguf(q8: bool, architecture: str, folder: Path) -> Case:
    """Base and fine-tune as GGUF files, with width 64 so that rows divide into Q8_0's blocks of 32."""
    base, tuned = pair_in_memory(architecture, hidden_size=64, intermediate_size=64, head_dim=16)
    for side, model in (("base", base), ("tuned", tuned), ("copy", base)):
        write_gguf(model, folder / side, q8=q8)
    return Case(base=folder / "base", tuned=folder / "tuned", copy=folder / "copy", base_model=base, tuned_model=tuned)


NEEDS = "its layout cannot be undone exactly, or needs a package or a GPU"
QUANTISED: tuple[Saving, ...] = (
    *(
        Saving(name=f"{kind}-both", what=f"{kind} on both sides", make=functools.partial(both_sides, kind), on=FAMILY,
               may=RUN, why=NEEDS, runs_rounded=True)
        for kind in ("fp8", "int8")
    ),
    *(
        Saving(name=f"{kind}-tuned", what=f"{kind} against a base in fp32", make=functools.partial(one_side, kind), on=FAMILY,
               rounding=0.05, tolerance=0.2, may=("directions", *RUN), why=NEEDS,
               runs_rounded=True)
        for kind in ("fp8", "int8")
    ),
    *(
        Saving(name=f"lora-on-{kind}", what=f"LoRA on a base in {kind}", make=functools.partial(lora_on, kind), on=FAMILY,
               may=RUN, why=NEEDS, runs_rounded=True)
        for kind in ("fp8", "int8", *STUBS)
    ),
    *(
        Saving(name=f"gguf-{kind}", what=f"GGUF with matrices in {kind}, on both sides", make=functools.partial(as_gguf, q8),
               on=("llama",), rounding=0.02 if q8 else 0.0, tolerance=0.1 if q8 else 1e-3, close=2e-3, may=RUN, why=NEEDS, runs_rounded=True)
        for kind, q8 in (("F32", False), ("Q8_0", True))
    ),
)  # fmt: skip
