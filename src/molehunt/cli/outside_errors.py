"""Errors of the system and of libraries that are no fault of Molehunt: full disks, closed folders, too little memory.

Code that reads a file turns what goes wrong into an error of its own, which names the file. What gets past it ends
here, with one message and an exit code that is never 1: that one means FLAGGED.
"""

import errno
import os
import re

from molehunt.errors import InvalidInput, MolehuntError, UsageError, printable
from molehunt.run.whole import SYSTEM_ERROR

ADVICE = {
    errno.ENOSPC: "The disk is full: make room, or give another folder (out, --out).",
    errno.EDQUOT: "Your share of the disk is used up: make room, or give another folder (out, --out).",
    errno.EROFS: "The file system is read-only: give another folder (out, --out).",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ELOOP: "Its symbolic links lead back to themselves.",
    errno.EMFILE: "Too many files are open: raise the limit (ulimit -n).",
    errno.ENXIO: "It is a pipe or a device that nobody reads; give a file or a folder.",
}
"""What to do about an error of the system; for others, `OTHERWISE`."""
OTHERWISE = "Check the path and its permissions, or give another one."
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|not enough memory", re.IGNORECASE)


def outside_error(error: BaseException) -> MolehuntError | None:
    """The error for the user that stands for `error`; None where that is a fault of Molehunt."""
    kind = f"{type(error).__module__}.{type(error).__name__}"
    said = printable(" ".join(str(error).split()), 300)
    if (number := SYSTEM_ERROR.search(str(error))) is not None and not isinstance(error, OSError):
        code = int(number.group(1))
        return outside_error(OSError(code, os.strerror(code)))
    if isinstance(error, OSError):
        return _of_system(error, said)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
        return InvalidInput(
            f"Out of memory{f' ({said})' if said else ''}.\nEither a file asks for more than its model needs, or these "
            "models are too large for this machine."
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of pathlib before Python 3.13
        return InvalidInput(f"{said}.\n{ADVICE[errno.ELOOP]}")
    if isinstance(error, RecursionError):
        return InvalidInput("A file is nested too deeply to be read. Fetch it again.")
    if isinstance(error, UnicodeError):
        return InvalidInput(f"A text is no Unicode: {said}.\nRemove the characters that are halves of a pair.")
    if kind == "pyo3_runtime.PanicException":
        return InvalidInput(f"A file made the library that reads it break: {said}.\nFetch the folder again.")
    if type(error) is Exception:  # tokenizers raises nothing more exact
        return InvalidInput(f"A file cannot be read: {said}.\nFetch it again.")
    if kind.endswith(".SafetensorError"):
        return InvalidInput(f"A safetensors file cannot be read: {said}.\nFetch it again.")
    return None


def _of_system(error: OSError, said: str) -> MolehuntError:
    if error.errno is None:  # a library's own, such as a file that it could not read
        return InvalidInput(f"{type(error).__name__}: {said}")
    names = [
        printable(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
    ]
    where = " and ".join(dict.fromkeys(names))
    what = error.strerror or os.strerror(error.errno)
    return UsageError(f"{where}{': ' if where else ''}{what}.\n{ADVICE.get(error.errno, OTHERWISE)}")
