"""Files that a watch keeps beside its state: versioned, whole or not at all, and never another watch's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from molehunt.errors import InvalidInput, UsageError, printable
from molehunt.run.whole import replace_whole

METADATA = "molehunt_watch_kept"


def keep(
    path: Path,
    what: str,
    schema: int,
    identity: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    told: Mapping[str, Any],
) -> None:
    """Replace the file at `path`, synced.

    Args:
        what: such as "range"; an error names the file so.
        schema: version of what is in it.
        identity: what it was made for, see `WatchState.identity`.
        told: the rest, ready for JSON.
    """
    header = json.dumps({"what": what, "schema": schema, "identity": dict(identity), "told": told})
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace_whole(path, lambda partial: save_file(whole, partial, {METADATA: header}))


def kept(path: Path, what: str, schema: int, identity: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and the rest of what `keep` wrote.

    Raises:
        UsageError: the file was made for another model, tokenizer, set of directions …; names which.
        InvalidInput: it is broken, of another version, or something else.
    """
    name = printable(path.name)
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[METADATA])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        found, version, other, told = (header[key] for key in ("what", "schema", "identity", "told"))
        differing = [key for key, value in identity.items() if other.get(key) != value]
    except (SafetensorError, KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        raise broken(path, what, str(error)) from None
    if found != what:
        raise broken(path, what, f"it is a {found}")
    if version != schema:
        raise InvalidInput(
            f"{name} is of schema {printable(str(version))}; this version reads {schema}.\nRemove it to begin anew."
        )
    if differing:
        raise UsageError(
            f"{name} was made for another {', '.join(differing)}.\nGive another --out folder, or remove the files of "
            "the watch to begin anew."
        )
    return tensors, told


def broken(path: Path, what: str, why: str) -> InvalidInput:
    """What to raise for a file whose content cannot be true."""
    return InvalidInput(f"{printable(path.name)} is no {what} of a watch: {printable(why)}.\nRemove it to begin anew.")
