"""Model folders on disk, good and bad."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tiny_models import tiny_model, tiny_tokenizer

INDEX = "model.safetensors.index.json"


def good_folder(path: Path, architecture: str = "llama", *, seed: int = 0, **saving: Any) -> Path:
    """A complete tiny model with its tokenizer."""
    tiny_model(architecture, seed).save_pretrained(path, **saving)
    tiny_tokenizer().save_pretrained(path)
    return path


def sharded_folder(path: Path, architecture: str = "llama", seed: int = 0) -> Path:
    return good_folder(path, architecture, seed=seed, max_shard_size="20KB")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    for key, value in changes.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    path.write_text(json.dumps(content))


def edit_index(folder: Path, change: Any) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def header_file(path: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    """A file with exactly this header, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def lora_folder(path: Path, architecture: str = "llama", seed: int = 3, **config: Any) -> Path:
    """A LoRA adapter with random factors for `tiny_model(architecture)`, as PEFT writes it."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_model(architecture), LoraConfig(**{**settings, **config}))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return path


def plain_adapter(path: Path, **config: Any) -> Path:
    """An adapter folder with one module and this adapter_config.json, right or wrong."""
    path.mkdir(parents=True)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (path / "adapter_config.json").write_text(json.dumps(content))
    prefix = "base_model.model.model.layers.0.mlp.down_proj.lora_"
    tensors = {f"{prefix}A.weight": torch.ones(2, 48), f"{prefix}B.weight": torch.ones(32, 2)}
    save_file(tensors, path / "adapter_model.safetensors")
    return path
