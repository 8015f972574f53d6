"""The two models that a map leads between: folders, adapters, hub ids, or the fine-tune of a loaded pair."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from molehunt.activation.identity import tokenizer_hash
from molehunt.checkpoint.hub import local_folder
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import UsageError, printable
from molehunt.model.adapters import ADAPTER_CONFIG
from molehunt.model.loading import device_of, load_model
from molehunt.model.pair import ModelPair
from molehunt.model.tokenizers import load_tokenizer
from molehunt.run.progress import Track, busy
from molehunt.transfer.map_file import ModelHashes
from molehunt.workflows.models import open_models, open_pair


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """One model that is loaded, with what names it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    checkpoint: str | None
    """Hash of its files; None for a model in memory."""


@contextmanager
def opened_model(
    model: ModelPair | str | Path, base: str | Path | None, device: str, track: Track
) -> Generator[OpenedModel, None, None]:
    """A model to read inside the block.

    Args:
        model: a folder or hub id, or a loaded pair, whose fine-tune is meant.
        base: the base of a model that is an adapter.
        device: where the model runs.
        track: shows that loading goes on.

    Raises:
        UsageError: an adapter without a base, or a base beside a loaded pair.
        MolehuntError: a folder is broken.
    """
    if isinstance(model, ModelPair):
        if base is not None:
            raise UsageError("a loaded pair holds its base; leave the other one out.")
        pair, checkpoint = open_pair(model, track=track)
        with pair.tuned_model() as module:
            yield OpenedModel(module, pair.tokenizer, checkpoint)
        return
    folder = local_folder(model)
    checkpoint = Checkpoint.open(folder, adapter="refuse" if base is None else "use").content_hash()
    if base is not None:
        pair = open_models(base, model, adapter=True, device=device, track=track).pair
        with pair.tuned_model() as module:
            yield OpenedModel(module, pair.tokenizer, checkpoint)
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"{printable(model_name(folder))} is an adapter: say what it is applied to with --source-base or --target-base."
        )
    where = device_of(device)
    with busy(track, f"loading {printable(model_name(folder))}"):
        module = load_model(folder, where, torch.float32 if where.type == "cpu" else None)
    yield OpenedModel(module, load_tokenizer(folder), checkpoint)


def hashes_of(source: OpenedModel, target: OpenedModel) -> ModelHashes:
    """What a map says of the models that it leads between."""
    return ModelHashes(
        source=source.checkpoint,
        target=target.checkpoint,
        source_tokenizer=tokenizer_hash(source.tokenizer),
        target_tokenizer=tokenizer_hash(target.tokenizer),
    )
