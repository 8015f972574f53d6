"""Puts adapters onto models, as PEFT applies them. No pickle is opened and no code from them is run."""

import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn

from molehunt.errors import InvalidInput, NotTestable, printable
from molehunt.model.load_errors import loading

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER = "default"
"""PEFT's name of the one adapter of a pair."""


@contextmanager
def without_adapter(folder: Path) -> Generator[Path, None, None]:
    """The folder without its adapter, as links if it has one: transformers would apply the adapter by default."""
    if not (folder / ADAPTER_CONFIG).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name) / folder.name
        plain.mkdir()
        for path in folder.iterdir():
            if not path.name.startswith("adapter_"):
                (plain / path.name).symlink_to(path.resolve())
        yield plain


def apply_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` inside a PEFT wrapper with the adapter in `folder` switched on. Some adapters change `model` itself.

    Raises InvalidInput when the adapter cannot be loaded onto this model, NotTestable when it is not a LoRA adapter.
    """
    from peft import LoraConfig, PeftConfig, PeftModel

    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InvalidInput(
            f"{printable(folder.name)} has no {ADAPTER_WEIGHTS}. Adapters stored as a pickle are never opened."
        )
    with loading(folder, "an adapter"):
        config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise NotTestable(f"{printable(folder.name)} is an adapter of type {config.peft_type}; only LoRA is read.")
    with loading(folder, "an adapter of this base"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's, of transformers
        device = next(model.parameters()).device
        return PeftModel.from_pretrained(
            cast("Any", model), str(folder), ADAPTER, config=config, torch_device=str(device)
        ).eval()
