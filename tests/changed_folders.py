"""A base folder with a fine-tune that changed every weight a little, rows of prompts, and the command run on them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from folders import good_folder
from molehunt.cli.main import main


def base_and_tuned(root: Path) -> Path:
    """`root`, with the model folders `base` and `tuned` in it."""
    base = good_folder(root / "base")
    (root / "tuned").mkdir()
    for file in base.iterdir():
        (root / "tuned" / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(3)
    weights = {n: t + 0.02 * torch.randn_like(t) for n, t in load_file(base / "model.safetensors").items()}
    save_file(weights, root / "tuned" / "model.safetensors", metadata={"format": "pt"})
    return root


def written(path: Path, prompts: list[str]) -> Path:
    """A JSONL file of these prompts."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def call(*arguments: object) -> int:
    """The exit code of `molehunt` with these arguments."""
    with pytest.raises(SystemExit) as left:
        main([str(one) for one in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code
