"""Files that are written completely or not at all: whatever is killed, a reader sees the old file or the new one."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust, such as safetensors, quote an error of the system."""


def write_whole(target: Path, text: str) -> Path:
    """Write `text` to `target`. Its folder is created if it does not exist."""
    return replace_whole(target, lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))


def replace_whole(target: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file beside `target`, sync it and put it in the place of `target`. Returns `target`.

    Raises:
        OSError: it cannot be written, also where a library in Rust says so in its own error.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(0o644)  # mkstemp makes it private
        partial.replace(target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if not isinstance(error, OSError) and (quoted := SYSTEM_ERROR.search(str(error))) is not None:
            number = int(quoted.group(1))
            raise OSError(number, os.strerror(number), str(target)) from error
        raise
    return target
