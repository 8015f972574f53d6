"""Tiny random models of many architectures, with weights large enough that greedy text varies."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCAB = 96
WIDTH = 32
COMMON = {
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SPREAD = {"initializer_range": 0.3}
LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **SPREAD,
}
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ALIBI = {"n_head": 4, "n_layer": 3, "hidden_size": WIDTH, **SPREAD}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
STATES = {"hidden_size": WIDTH, "num_hidden_layers": 3, "state_size": 8, **SPREAD}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**LLAMA, **HEADS}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", {**LLAMA, **HEADS}),
    "qwen3_moe": ("Qwen3Moe", {**LLAMA, **HEADS, **EXPERTS}),
    "mixtral": ("Mixtral", {**LLAMA, "num_local_experts": 4}),
    "gemma2": ("Gemma2", {**LLAMA, **HEADS, **SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", {**LLAMA, **HEADS, **SLIDING}),
    "gemma3_with_vision": ("Gemma3", {**LLAMA, **HEADS, **SLIDING}),
    "gpt2": ("GPT2", {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 256, **SPREAD}),
    "gpt_neox": ("GPTNeoX", {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}),
    "phi3": ("Phi3", LLAMA),
    "falcon": ("Falcon", {**LLAMA, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon_alibi": ("Falcon", {**LLAMA, "multi_query": True, "alibi": True}),
    "opt": ("OPT", {**LLAMA, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "init_std": 0.3}),
    "bloom": ("Bloom", ALIBI),
    "mpt": ("Mpt", {"d_model": WIDTH, "n_heads": 4, "n_layers": 3, "max_seq_len": 256, **SPREAD}),
    "stablelm": ("StableLm", LLAMA),
    "olmo2": ("Olmo2", LLAMA),
    "gpt_oss": ("GptOss", {**LLAMA, **HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
                "layer_types": SLIDING["layer_types"]}),
    "mamba": ("Mamba", {**STATES, "expand": 2}),
    "mamba2": ("Mamba2", {**STATES, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2, "chunk_size": 16}),
    "falcon_mamba": ("FalconMamba", {**STATES, "expand": 2}),
    "recurrent_gemma": ("RecurrentGemma", {**LLAMA, **HEADS, "lru_width": WIDTH, "attention_window_size": 8,
                        "block_types": ["recurrent", "attention"], "w_init_variance_scale": 1.0}),
    "jamba": ("Jamba", {**LLAMA, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4,
              "use_mamba_kernels": False}),
    "qwen3_next": ("Qwen3Next", {**LLAMA, **HEADS, **EXPERTS, "layer_types": ["linear_attention", "full_attention",
                   "linear_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 24}),
    "lfm2": ("Lfm2", {**LLAMA, "layer_types": ["conv", "full_attention", "conv"]}),
    "rwkv": ("Rwkv", {"hidden_size": WIDTH, "num_hidden_layers": 3, "attention_hidden_size": WIDTH}),
    "xlstm": ("xLSTM", {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_heads": 4}),
    "granite_hybrid": ("GraniteMoeHybrid", {**LLAMA, "layer_types": ["mamba", "attention", "mamba"],
                       "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
                       "num_local_experts": 0, "shared_intermediate_size": 48, "position_embedding_type": "rope"}),
    "bamba": ("Bamba", {**LLAMA, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8,
              "mamba_d_state": 8, "mamba_n_groups": 1}),
    "zamba2": ("Zamba2", {**LLAMA, "mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "layers_block_type": ["mamba", "hybrid", "mamba"]}),
}  # fmt: skip
"""Name → the class's prefix in transformers, and what its config is given besides `COMMON`."""

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {**LLAMA, **HEADS, "sliding_window": None}),
    "deepseek_v3": ("DeepseekV3", {**LLAMA, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 4,
                    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1, "n_group": 1,
                    "topk_group": 1, "first_k_dense_replace": 1}),
    "olmoe": ("Olmoe", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "starcoder2": ("Starcoder2", LLAMA),
    "gptj": ("GPTJ", {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 256, "rotary_dim": 4, **SPREAD}),
    "cohere": ("Cohere", LLAMA),
    "granite": ("Granite", LLAMA),
    "smollm3": ("SmolLM3", LLAMA),
}  # fmt: skip
"""Architectures that are read from folders only, so that the tests of decoding stay as fast as they are."""

VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
TILES = {**VISION, "image_size": 8, "patch_size": 4}
ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}


def zoo_model(name: str, seed: int = 0, **changed: Any) -> nn.Module:
    """A random model in eval mode, with these settings of its (text) config changed."""
    if name in BUILT:
        torch.manual_seed(seed)
        return _spread(BUILT[name](changed), seed)
    hf: Any = importlib.import_module("transformers")
    prefix, options = {**OPTIONS, **MORE}[name]
    config_class = getattr(hf, f"{prefix}TextConfig", None) or getattr(hf, f"{prefix}Config")
    model_class = getattr(hf, f"{prefix}ForCausalLM", None) or getattr(hf, f"{prefix}LMHeadModel")
    torch.manual_seed(seed)
    return _spread(model_class(config_class(**{**COMMON, **options, **changed})), seed)


def _gemma3_with_vision(changed: dict[str, Any]) -> nn.Module:
    """Its decoder is handed embeddings, and a mask for each kind of block."""
    hf: Any = importlib.import_module("transformers")
    text = hf.Gemma3TextConfig(**{**COMMON, **OPTIONS["gemma3_with_vision"][1], **changed})
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=hf.SiglipVisionConfig(**TILES),
        mm_tokens_per_image=1,
        image_token_index=VOCAB - 1,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _qwen_vl(prefix: str, changed: dict[str, Any]) -> nn.Module:
    hf: Any = importlib.import_module("transformers")
    vision = {"depth": 1, "num_heads": 1, "patch_size": 4}
    if prefix == "Qwen2VL":
        vision |= {"embed_dim": 8, "hidden_size": WIDTH, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 8, "intermediate_size": 8, "out_hidden_size": WIDTH}
    config = getattr(hf, f"{prefix}Config")(
        text_config={**COMMON, **LLAMA, **ROTATED, **changed},
        vision_config=vision,
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
        tie_word_embeddings=False,
    )
    return getattr(hf, f"{prefix}ForConditionalGeneration")(config)


def _llava(changed: dict[str, Any]) -> nn.Module:
    hf: Any = importlib.import_module("transformers")
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**{**COMMON, **LLAMA, **HEADS, **changed}),
        vision_config=hf.CLIPVisionConfig(**TILES),
        image_token_index=VOCAB - 1,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return hf.LlavaForConditionalGeneration(config)


def _mistral3(changed: dict[str, Any]) -> nn.Module:
    hf: Any = importlib.import_module("transformers")
    config = hf.Mistral3Config(
        text_config=hf.MistralConfig(**{**COMMON, **LLAMA, **HEADS, **changed}),
        vision_config=hf.PixtralVisionConfig(**{**TILES, "head_dim": 8}),
        image_token_index=VOCAB - 1,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return hf.Mistral3ForConditionalGeneration(config)


def _t5(changed: dict[str, Any]) -> nn.Module:
    hf: Any = importlib.import_module("transformers")
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**{**COMMON, **sizes, **changed}))


def _bart(changed: dict[str, Any]) -> nn.Module:
    hf: Any = importlib.import_module("transformers")
    sizes = {"d_model": WIDTH, "max_position_embeddings": 256}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 3, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    return hf.BartForConditionalGeneration(hf.BartConfig(**{**COMMON, **sizes, **changed, "tie_word_embeddings": True}))


def _bert(changed: dict[str, Any]) -> nn.Module:
    hf: Any = importlib.import_module("transformers")
    sizes = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    return hf.BertModel(hf.BertConfig(**{**COMMON, **sizes, **changed}))


BUILT: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "gemma3_with_vision": _gemma3_with_vision,
    "qwen2_vl": lambda changed: _qwen_vl("Qwen2VL", changed),
    "qwen2_5_vl": lambda changed: _qwen_vl("Qwen2_5_VL", changed),
    "llava": _llava,
    "mistral3": _mistral3,
    "t5": _t5,
    "bart": _bart,
    "bert": _bert,
}
"""Name → what builds a model whose config has parts, or that is no decoder."""
WRAPPED = ("gemma3_with_vision", "qwen2_vl", "qwen2_5_vl", "llava", "mistral3")
"""Decoders inside a model that also takes images."""
NO_DECODER = ("t5", "bart", "bert")
"""Encoder–decoders and encoders, which are refused by name."""
ARCHITECTURES = tuple(dict.fromkeys([*OPTIONS, *MORE, *BUILT]))


def _spread(model: nn.Module, seed: int) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1 and float(parameter.detach().std()) < 0.25:  # configs without an initializer_range
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)
    return model.eval()
