"""The two models that a command names, and what is written down of the tuned one."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from molehunt.checkpoint.reader import Checkpoint
    from molehunt.model.pair import ModelPair


def open_pair(base: str | Path, tuned: str | Path, adapter: bool | None, device: str) -> "ModelPair":
    """Load both models, and show on stderr that this goes on."""
    from molehunt.cli.console import track_on_stderr
    from molehunt.errors import printable
    from molehunt.run.progress import busy

    with busy(track_on_stderr, f"loading {printable(Path(base).name)} and {printable(Path(tuned).name)}"):
        from molehunt.model.pair import ModelPair  # seconds, before any weight is read

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
