"""Loads what a model pair is made of: both models and the tokenizer that encodes for both."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from molehunt.checkpoint.adapter_folder import is_adapter_folder
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.skeleton import skeleton
from molehunt.errors import UsageError, printable
from molehunt.model.adapted import applies_adapter, base_and_adapted
from molehunt.model.adapter_fit import must_fit
from molehunt.model.adapters import ADAPTER_CONFIG, apply_adapter
from molehunt.model.base_shapes import check_shapes
from molehunt.model.loading import load_model
from molehunt.model.precision import running_dtype
from molehunt.model.tokenizers import PairTokenizer, one_tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedPair:
    """Both models, which may be one module, and their tokenizer."""

    base: nn.Module
    tuned: nn.Module
    tokenizer: PairTokenizer


def loaded_pair(
    base: Path, tuned: Path, device: torch.device, dtype: torch.dtype | None, adapter: bool | None
) -> LoadedPair:
    """Load both models and one tokenizer. The arguments are those of `ModelPair.load`, with folders for paths.

    Raises:
        UsageError: the base holds an adapter, or `adapter` must be given or cannot be applied.
        InvalidInput: a folder cannot be loaded, or lacks weights that its architecture needs.
        NotTestable: the base is another model's, the tokenizers conflict, or the adapter changes no weight.
    """
    if (base / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"{printable(model_name(base))} holds an adapter ({ADAPTER_CONFIG}); a base is plain weights.\n"
            "Loaders would apply it by default. Move it out, and give its folder as the fine-tune."
        )
    applied = applies_adapter(tuned, adapter)
    if applied and is_adapter_folder(tuned):  # first: an adapter of another base has its tokenizer, too
        must_fit(skeleton(base), tuned)
    check_shapes(base, tuned)  # before the tokenizers: those of another model conflict, too, and that is not the cause
    tokenizer = one_tokenizer(base, tuned)
    if dtype is None:
        dtype = running_dtype(base, tuned, device)
    if applied and is_adapter_folder(tuned):
        first, second = base_and_adapted(base, tuned, device, dtype)
        return LoadedPair(base=first, tuned=second, tokenizer=tokenizer)
    first, second = (load_model(folder, device, dtype) for folder in (base, tuned))
    return LoadedPair(base=first, tuned=apply_adapter(second, tuned) if applied else second, tokenizer=tokenizer)
