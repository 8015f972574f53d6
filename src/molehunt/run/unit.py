"""Hash-addressed work: each unit is done once, and completely or not at all.

A unit is a folder named by the hash of what determines it. It is written under another name, checksummed,
synced and renamed, so kill -9 at any moment loses only the running unit, and a rerun skips finished units.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from molehunt import __version__

if TYPE_CHECKING:
    from torch import Tensor

    JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
else:
    JSON = Any  # a recursive alias cannot be checked at run time
    Tensor = Any  # this module starts without torch: shards of small work start in a blink

UNIT_SCHEMA = 1
"""Part of every key. Raise it when the same configuration comes to mean another result."""
CHECKSUMS = "SHA256SUMS"

log = logging.getLogger(__name__)


def unit_key(config: Mapping[str, JSON], inputs: Mapping[str, str]) -> str:
    """The 64 hex digits that name a unit.

    Args:
        config: every setting that can change the result.
        inputs: name → hash of every file or unit that is read.

    Raises:
        ValueError: a number in `config` is not finite.
    """
    payload = {"schema": UNIT_SCHEMA, "version": __version__, "config": config, "inputs": inputs}
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()


def canonical_json(value: JSON) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text. NaN and infinity are a ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_as_dict)


class Units:
    """A folder of finished units. Any number of processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Folder of the unit, whether or not it exists yet."""
        return self.folder / key

    def done(self, key: str) -> bool:
        """Whether the unit exists and every byte matches its checksum."""
        return self.path(key).exists() and _damage(self.path(key)) is None

    def run(self, key: str, make: Callable[[Path], None]) -> Path:
        """The folder of the finished unit, which is made now if it does not exist.

        Args:
            key: from `unit_key`.
            make: writes the unit's files into the empty folder that it gets, and nothing elsewhere. When it raises
                an error, the error is passed on and no unit remains.

        A unit that does not match its checksums is named in the log and made again. When another process is
        making the same unit, this waits for it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.done(key):
            return self.path(key)
        with _locked(self.folder / f"{key}.lock"):
            path, partial = self.path(key), self.folder / f"{key}.partial"
            if path.exists():
                damage = _damage(path)
                if damage is None:  # finished while we waited
                    return path
                log.warning("unit %s is damaged (%s); it is made again", path, damage)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                make(partial)
                _seal(partial)
                if path.exists():
                    shutil.rmtree(path)
                partial.rename(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            _sync(self.folder)
        return path

    def json(self, key: str, make: Callable[[], JSON]) -> Any:
        """What `make` returns, written as JSON and read back from the file, on the first run and later."""
        folder = self.run(key, lambda path: _write(path / "value.json", canonical_json(make()).encode()))
        return json.loads((folder / "value.json").read_bytes())

    def tensors(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` returns, written as safetensors and read back on the CPU."""
        from safetensors.torch import load_file, save_file

        def write(path: Path) -> None:
            save_file({name: t.contiguous() for name, t in make().items()}, path / "value.safetensors")

        return load_file(self.run(key, write) / "value.safetensors")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _as_dict(value: object) -> object:
    if isinstance(value, Mapping):  # json knows dict alone
        return {**value}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)


def _seal(folder: Path) -> None:
    """Write the checksums and sync all files to disk, so that a rename never exposes a half-written file."""
    files = _files(folder)
    if not files:
        raise ValueError("a unit must write at least one file")
    listed = "".join(f"{file_hash(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    _write(folder / CHECKSUMS, listed.encode())  # `sha256sum -c SHA256SUMS` reads it, too
    for path in [*files, folder / CHECKSUMS, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _sync(path)


def _damage(folder: Path) -> str | None:
    """What is wrong with a finished unit; None when every byte is as it was written."""
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return f"no readable {CHECKSUMS}"
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    if listed.keys() != found.keys() or not listed:
        return "files are missing or were added"
    return next((f"{name} has changed" for name, path in found.items() if file_hash(path) != listed[name]), None)


@contextmanager
def _locked(path: Path) -> Generator[None]:
    """Take the lock file at `path`, exclusively. The system releases the lock of a killed process."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(handle), path.stat()):
                break
        except FileNotFoundError:
            pass
        os.close(handle)  # the previous owner of the lock has removed this file, so locking it has no effect
    try:
        yield
    finally:
        path.unlink()
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
