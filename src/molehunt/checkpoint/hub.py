"""Folders of the hub's cache: a repository's name becomes a folder, which is fetched if needed."""

import os
from pathlib import Path

from molehunt.errors import UsageError, printable

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Patterns of the files that are fetched from a hub repository: none of them can run."""


def local_folder(path: str | Path) -> Path:
    """The folder at `path`, or the local copy of the hub repository of that name, which is fetched if needed.

    A path that is absolute or begins with ./ or ../ is never looked up on the hub. Raises UsageError when neither exists.
    """
    if Path(path).is_dir():
        return Path(path)
    name = printable(str(path))
    if Path(path).is_absolute() or str(path).startswith(("./", "../", f".{os.sep}", f"..{os.sep}")):
        raise UsageError(f"There is no folder {name}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"There is no folder {name}, and no model of that name could be fetched from the hub:\n"
            f"{printable(' '.join(str(error).split()), 300)}"
        ) from error
