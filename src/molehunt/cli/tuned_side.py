"""The two models that a command names, and what is written down of the tuned one."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from molehunt.checkpoint.reader import Checkpoint
    from molehunt.model.pair import ModelPair


def open_pair(base: str, tuned: str, adapter: bool | None, device: str) -> "ModelPair":
    """Both models, loaded."""
    from molehunt.model.pair import ModelPair

    return ModelPair.load(base, tuned, adapter=adapter, device=device)


def checkpoint_of(tuned: str, adapter: bool | None) -> "Checkpoint":
    """The tuned model's files."""
    from molehunt.checkpoint.reader import Checkpoint
    from molehunt.model.loading import local_folder

    choice = "refuse" if adapter is None else "use" if adapter else "ignore"
    return Checkpoint.open(local_folder(tuned), adapter=choice)


def hash_of(tuned: str, adapter: bool | None) -> str:
    """Of the tuned model's files: what a vector or a fix was made for."""
    return checkpoint_of(tuned, adapter).content_hash()
