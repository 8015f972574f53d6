"""Loads models from folders. No pickle is opened and no code from them is run."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from molehunt.checkpoint.loaded_view import LoadedView
from molehunt.checkpoint.reader import Checkpoint
from molehunt.checkpoint.skeleton import model_class, prove_config
from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.model.adapters import without_adapter
from molehunt.model.load_errors import loading
from molehunt.model.loaded_truth import check_loaded
from molehunt.model.tokenizers import load_tokenizer as load_tokenizer  # people look for it here

MAX_LAYERS = 1000
"""Greatest number of layers: a larger config is refused before a model of that size is built."""


def device_of(name: str | torch.device) -> torch.device:
    """The device that models run on. Raises UsageError if torch does not know it or this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device (--device) {printable(str(name))}: {str(error).splitlines()[0]}. Give cpu, or a device of this machine."
        ) from None
    return device


def load_model(folder: Path, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """The language model in `folder`, in eval mode, checked against the folder's own tensors (see `check_loaded`).

    A decoder inside a multimodal wrapper is loaded with its wrapper. An adapter beside its weights is not applied.

    Raises:
        InvalidInput: it cannot be loaded, lacks weights that its architecture needs, or holds others than its files show.
        NotTestable: it is no decoder, or transformers does not know its architecture.
    """
    from transformers import AutoConfig

    with loading(folder, "a causal language model"), without_adapter(folder) as plain:
        prove_config(plain)
        config = cast("Any", AutoConfig).from_pretrained(plain, trust_remote_code=False, local_files_only=True)
        n_layers = config.get_text_config(decoder=True).num_hidden_layers
        if not 0 < n_layers <= MAX_LAYERS:
            raise ValueError(f"its config asks for {n_layers} layers")
        if config._attn_implementation not in (None, "eager", "sdpa"):
            config._attn_implementation = None  # others need packages, and compute the same
        loaded: Any = model_class(config).from_pretrained(
            plain,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    model, info = cast("tuple[nn.Module, dict[str, Any]]", loaded)
    missing = sorted(info["missing_keys"])
    if missing:
        LoadedView.of(Checkpoint.open(folder, adapter="ignore"))  # which says so if the model gives no text
        raise InvalidInput(
            f"{printable(folder.name)} has no {printable(missing[0])}"
            + (f" and lacks {len(missing) - 1} tensors more" if len(missing) > 1 else "")
            + "; loaders fill such weights with random numbers.\nGet a complete copy of the model."
        )
    check_loaded(model, folder)
    return model.to(device).eval()


def checksum(parameter: Tensor) -> int:
    """Sum of the raw bits as integers, which changes when any one weight does."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return int(parameter.detach().view(integer).sum(dtype=torch.int64))
