"""Files that a watch saves: versioned, whole or not at all, and never read by another watch."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.run.saved_file import header_and_tensors, reading
from molehunt.run.whole import replace_whole

METADATA = "molehunt_watch_kept"
"""Key of the file's metadata."""
ANEW = "Remove it to start anew."


def save_state(
    path: Path,
    what: str,
    schema: int,
    identity: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    payload: Mapping[str, Any],
) -> None:
    """Replace the file at `path`, synced.

    Args:
        what: what the file is, for error messages, such as "published range".
        schema: version of its content.
        identity: what it was made for, see `WatchState.identity`.
        payload: everything else that is saved, ready for JSON.
    """
    header = json.dumps({"what": what, "schema": schema, "identity": dict(identity), "payload": payload})
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace_whole(path, lambda partial: save_file(whole, partial, {METADATA: header}))


def load_state(
    path: Path, what: str, schemas: Collection[int], identity: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and payload of what `save_state` wrote.

    Args:
        schemas: versions that the caller reads, the newest last.

    Raises:
        UsageError: the file was made for another model, tokenizer, set of directions …; names which.
        InvalidInput: it is broken, of another version, or something else.
    """
    name = printable(path.name)
    with reading(path, f"{what} of a watch", ANEW):
        header, tensors = header_and_tensors(path, METADATA)
        found, version, other = (header.pop(key) for key in ("what", "schema", "identity"))
        (payload,) = header.values()  # older versions have another name for it
        differing = [key for key, value in identity.items() if other.get(key) != value]
    if found != what:
        raise broken(path, what, f"it is a {printable(str(found), 40)}")
    if version not in schemas:
        raise InvalidInput(
            f"{name} is of schema {printable(str(version))}; this version reads {max(schemas)}.\nRemove it to start anew."
        )
    if differing:
        raise UsageError(
            f"{name} was made for another {', '.join(differing)}.\nGive another folder (out, --out), or remove the files of "
            "the watch to start anew."
        )
    return tensors, payload


def broken(path: Path, what: str, why: str) -> InvalidInput:
    """The error for a file whose content is impossible."""
    return InvalidInput(f"{printable(path.name)} is no {what} of a watch: {printable(why)}.\n{ANEW}")
