"""In which precision models run: the one that they are stored in where the device multiplies in it, else fp32."""

import math
from pathlib import Path

import torch

from molehunt.checkpoint.adapter_folder import is_adapter_folder
from molehunt.checkpoint.reader import Checkpoint

LARGE = 50_000_000
"""Number of weights from which on bf16 products pay on a CPU: three times as many tokens a second at 135 million."""


def running_dtype(base: Path, tuned: Path, device: torch.device) -> torch.dtype | None:
    """The data type that both models of a pair are loaded in; None is the one that each is stored in.

    On a CPU this is fp32, but bf16 for large models where the CPU has instructions for it and all matrices of both are
    stored in bf16: nothing about the weights is lost then, and activations are rounded as they are on a GPU. An adapter
    beside them stays as it is.

    Args:
        base: folder of the base.
        tuned: folder of the fine-tune or its adapter.
        device: device of both models.

    Raises:
        InvalidInput: a folder is broken.
    """
    if device.type != "cpu":
        return None
    whole = [folder for folder in (base, tuned) if not is_adapter_folder(folder)]
    if multiplies_bf16() and all(_large_in_bf16(Checkpoint.open(folder, adapter="ignore")) for folder in whole):
        return torch.bfloat16
    return torch.float32


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16; without them they are slower than in fp32."""
    able = getattr(torch.cpu, "get_capabilities", dict[str, bool])()  # older torch does not say
    return any(bool(able.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _large_in_bf16(folder: Checkpoint) -> bool:
    matrices = [name for name in folder.names() if len(folder.shape(name)) > 1]
    exact = folder.quantisation is None and all(folder.dtype(name) == torch.bfloat16 for name in matrices)
    return exact and sum(math.prod(folder.shape(name)) for name in matrices) >= LARGE
