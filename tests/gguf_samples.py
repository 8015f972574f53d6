"""GGUF files of tiny models, written with the package gguf as llama.cpp's converter writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def write_llama_gguf(folder: Path, into: Path, kind: str = "F16", **extra: str | int) -> Path:
    """The Llama in `folder` as a GGUF file whose matrices have one format; norms are fp32.

    Values in `extra` are added as they are, or replace others: the keys' dots are written as two underscores.
    """
    import gguf
    from gguf.quants import quantize
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    config = model.config
    into.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(into, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder)
    for key, value in extra.items():
        name = key.replace("__", ".")
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        stem = names.get_name(name.removesuffix(".weight"))
        data = value.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            data = _interleaved(data, heads)
        wanted = gguf.GGMLQuantizationType[kind if data.ndim > 1 else "F32"]
        writer.add_tensor(f"{stem}.weight", quantize(np.ascontiguousarray(data), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return into


def _interleaved(weight: "np.ndarray[Any, Any]", heads: int) -> "np.ndarray[Any, Any]":
    """Rows in the order of llama.cpp's rotary embedding, as its converter permutes them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: Any, folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    special = {one["id"]: one["content"] for one in content["added_tokens"]}
    tokens = {**{number: token for token, number in vocabulary.items()}, **special}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([tokens[i] for i in sorted(tokens)])
    writer.add_token_types([3 if i in special else 1 for i in sorted(tokens)])
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in content["model"]["merges"]])
    writer.add_eos_token_id(min(special, default=0))
    if (folder / "chat_template.jinja").is_file():
        writer.add_chat_template((folder / "chat_template.jinja").read_text())
