"""The two models that a verb works on: folders, adapters and hub ids, or a pair that is loaded already."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

from molehunt.checkpoint.hub import local_folder
from molehunt.checkpoint.links import model_name
from molehunt.checkpoint.reader import AdapterChoice, Checkpoint
from molehunt.errors import UsageError, printable
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, busy, silent

Models = ModelPair | str | Path
"""A loaded pair, or the base's folder or hub id, which the fine-tune's then follows."""


@dataclass(frozen=True, eq=False)
class OpenedModels:
    """A loaded pair and the folders that it was loaded from."""

    pair: ModelPair
    base: Path
    tuned: Path
    adapter: bool | None

    @cached_property
    def checkpoints(self) -> tuple[Checkpoint, Checkpoint]:
        """The files of base and fine-tune."""
        return Checkpoint.open(self.base), Checkpoint.open(self.tuned, adapter=adapter_choice(self.adapter))

    @cached_property
    def tuned_hash(self) -> str:
        """Hash of the fine-tune's files: what a vector or a fix was made for."""
        return self.checkpoints[1].content_hash()


def adapter_choice(adapter: bool | None) -> AdapterChoice:
    """What a checkpoint is to do with an adapter beside full weights."""
    return "refuse" if adapter is None else "use" if adapter else "ignore"


@overload
def open_models(
    base: ModelPair, tuned: None = None, *, adapter: bool | None = None, device: str = "cpu", track: Track = silent
) -> OpenedModels: ...
@overload
def open_models(
    base: Models,
    tuned: str | Path | None = None,
    *,
    adapter: bool | None = None,
    device: str = "cpu",
    track: Track = silent,
) -> OpenedModels: ...
def open_models(
    base: Models,
    tuned: str | Path | None = None,
    *,
    adapter: bool | None = None,
    device: str = "cpu",
    track: Track = silent,
) -> OpenedModels:
    """Load base and fine-tune, or take a pair that is loaded already.

    Args:
        base: the base's folder or hub id, or a pair from `ModelPair.load`.
        tuned: the folder or hub id of the fine-tune or its adapter; left out with a loaded pair.
        adapter: for a folder that holds full weights and an adapter, whether the adapter is applied.
        device: where the models run.
        track: shows that loading goes on.

    Raises:
        UsageError: a pair and a second model were given, or only one model, or the pair was not loaded from folders.
        MolehuntError: a folder is broken, or the two are no pair.
    """
    if isinstance(base, ModelPair):
        if tuned is not None:
            raise UsageError("a loaded pair holds both models; leave the second one out.")
        if base.folders is None:
            raise UsageError(
                "this pair was made from models in memory, and files are read here, too: save both with "
                "save_pretrained, and load them with ModelPair.load(base, tuned)."
            )
        return OpenedModels(base, *base.folders, base.adapter)
    if tuned is None:
        raise UsageError("give the base and its fine-tune, or one loaded ModelPair.")
    folders = local_folder(base, track), local_folder(tuned, track)
    with busy(track, f"loading {printable(model_name(folders[0]))} and {printable(model_name(folders[1]))}"):
        pair = ModelPair.load(*folders, adapter=adapter, device=device)
    return OpenedModels(pair, *folders, adapter)


def open_pair(
    base: Models,
    tuned: str | Path | None = None,
    *,
    adapter: bool | None = None,
    device: str = "cpu",
    track: Track = silent,
) -> tuple[ModelPair, str | None]:
    """The loaded pair and the hash of the fine-tune's files, for verbs that read nothing else of the folders.

    The hash is None for a pair that was made from models in memory. Raises as `open_models`.
    """
    if isinstance(base, ModelPair) and base.folders is None and tuned is None:
        return base, None
    opened = open_models(base, tuned, adapter=adapter, device=device, track=track)
    return opened.pair, opened.tuned_hash
