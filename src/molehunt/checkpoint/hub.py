"""Folders of the hub's cache: a repository's name becomes a folder, which is fetched if needed."""

import os
import re
from pathlib import Path

from molehunt.checkpoint.gguf import gguf_file, gguf_folder
from molehunt.errors import UsageError, printable
from molehunt.run.progress import Track, silent

HUB_FILES = ("*.json", "*.safetensors", "*.model", "merges.txt", "vocab.txt", "*.jinja")
"""Patterns of the files that are fetched from a hub repository: none of them can run."""
MORE_TEMPLATES = "additional_chat_templates"
"""The one folder of a repository that loaders read as well. Others, such as onnx/ and original/, are not fetched."""
OTHER_FOLDERS = (
    *(f"{MORE_TEMPLATES[:i]}[!{MORE_TEMPLATES[i]}]*/*" for i in range(len(MORE_TEMPLATES))),
    *(f"{MORE_TEMPLATES[:i]}/*" for i in range(len(MORE_TEMPLATES))),
    f"{MORE_TEMPLATES}[!/]*/*",
    f"{MORE_TEMPLATES}/*[!a]",
)
"""Patterns of everything in other folders. fnmatch has no "all but", so names that differ in one letter are listed."""
HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9_][\w.-]*(/[\w.-]+)?)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
"""A repository's name, and after an @ the branch, tag or commit that is meant."""


def local_folder(path: str | Path, track: Track = silent) -> Path:
    """The folder at `path`, or the local copy of the hub repository of that name, which is fetched if needed.

    `org/name@revision` means a branch, a tag or a commit. A path that is absolute or begins with ./ or ../ is never
    looked up on the hub. With HF_HUB_OFFLINE=1, or without a network, the copy in the hub's cache is taken. A GGUF file,
    or a folder that holds one and no other weights, is converted into a folder of the cache (see `gguf_folder`).

    Raises:
        UsageError: nothing of that name exists, or the package gguf is missing.
        InvalidInput: a GGUF file is broken.
        NotTestable: a GGUF file holds no language model that transformers reads.
    """
    if (converted := gguf_file(path)) is not None:
        return gguf_folder(converted, track)
    if Path(path).is_dir():
        return Path(path)
    shown, text = printable(str(path)), str(path)
    if Path(path).exists():
        raise UsageError(f"{shown} is a file; give the folder of a model, or its name on the hub.")
    wanted = HUB_ID.fullmatch(text)
    if text.startswith(("/", "./", "../", f".{os.sep}", f"..{os.sep}")) or Path(path).is_absolute():
        raise UsageError(f"There is no folder {shown}.")
    if wanted is None or ".." in text:
        raise UsageError(f"There is no folder {shown}, and no model on the hub has such a name (org/name).")
    return _snapshot(wanted["name"], wanted["revision"])


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=list(OTHER_FOLDERS)
            )
        )
    except Exception as error:  # whichever library speaks to the network, and with whatever it meets there
        if "/" not in name and _unknown(error):
            raise UsageError(f"There is no folder {printable(name)}. Hub names have the form org/name.") from error
        said = printable(" ".join(str(error).split()), 300)
        raise UsageError(
            f"There is no folder {printable(name)}, and {_why(name, revision, error)}\n({said})"
        ) from error


def _unknown(error: Exception) -> bool:
    """Whether the hub, or its cache, has no repository of a name."""
    from huggingface_hub import errors

    return isinstance(error, errors.RepositoryNotFoundError | errors.LocalEntryNotFoundError) and not isinstance(
        error, errors.GatedRepoError | errors.IncompleteSnapshotError
    )


def _why(name: str, revision: str | None, error: Exception) -> str:
    """What kept a repository from being fetched, and what to do."""
    from huggingface_hub import constants, errors

    shown = printable(name)
    at = f" at the revision {printable(revision)}" if revision else ""
    fetch = f"hf download {shown}" + (f" --revision {printable(revision)}" if revision else "")
    if isinstance(error, errors.GatedRepoError):
        return f"the hub's model {shown} is gated: accept its terms on its page there, then log in: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub's model {shown} has no revision {printable(revision or 'main')}: give a branch, tag or commit."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the hub has no model {shown} that you may see: check its name, or log in if it is private: hf auth login"
        )
    if isinstance(error, errors.IncompleteSnapshotError):
        return f"the copy of {shown} in the hub's cache lacks files. With a network, complete it: {fetch}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = (
            "the network is switched off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "the hub was not reached"
        )
        return f"the hub's cache has no model {shown}{at}, and {cause}. With a network, fetch it once: {fetch}"
    return f"no model {shown}{at} could be fetched from the hub."
