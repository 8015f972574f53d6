"""Adapters of many kinds, trained by nobody but with random weights, as PEFT saves them."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tiny_models import VOCAB, save

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("LORA", {"use_dora": True}),
    "pissa": ("LORA", {"init_lora_weights": "pissa"}),
    "olora": ("LORA", {"init_lora_weights": "olora"}),
    "kasa": ("LORA", {"kasa_config": {}}),
    "tokens": ("LORA", {"trainable_token_indices": [7, 30]}),
    "tied": ("LORA", {"target_modules": ["embed_tokens", "o_proj"], "ensure_weight_tying": True}),
    "adalora": ("ADALORA", {"total_step": 10, "init_r": 4, "target_r": 2}),
    "vera": ("VERA", {}),
    "vblora": ("VBLORA", {"num_vectors": 8, "vector_length": 8}),
    "loha": ("LOHA", {}),
    "lokr": ("LOKR", {}),
    "ia3": ("IA3", {"feedforward_modules": ["down_proj"]}),
    "oft": ("OFT", {"oft_block_size": 4, "r": 0}),
    "boft": ("BOFT", {"boft_block_size": 4}),
    "hra": ("HRA", {"r": 4}),
    "fourierft": ("FOURIERFT", {"n_frequency": 20}),
    "c3a": ("C3A", {"block_size": 8}),
    "shira": ("SHIRA", {"r": 2}),
    "randlora": ("RANDLORA", {}),
    "miss": ("MISS", {"r": 4}),
    "ln_tuning": ("LN_TUNING", {"target_modules": ["input_layernorm", "norm"]}),
}
"""Name → PEFT's type and what its config is given."""
TARGETS = ["o_proj", "down_proj"]


def tied_base(folder: Path) -> Path:
    """A Mistral of one block with tied embeddings."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return save(hf.MistralForCausalLM(config), folder)


def loaded(base: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def adapter_of(base: Path, folder: Path, peft_type: str, *, scale: float = 0.1, seed: int = 1, **options: Any) -> Path:
    """An adapter on `base`, moved away from its first values by `scale`."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(loaded(base), config)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(scale * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


def renamed(adapter: Path, to: Path, rename: Callable[[str], str | None], **settings: Any) -> Path:
    """A copy whose tensors are called otherwise, or left out where `rename` gives None; settings are changed, too."""
    shutil.copytree(adapter, to)
    tensors = load_file(adapter / "adapter_model.safetensors")
    named = {rename(name): value for name, value in tensors.items()}
    kept = {name: value for name, value in named.items() if name is not None}
    save_file(kept, to / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return to
