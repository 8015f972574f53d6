"""A run is a folder: config.json, env.json, metrics.jsonl, units and what the command writes beside them."""

import json
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from molehunt.errors import UsageError, printable
from molehunt.run.commit import commit
from molehunt.run.unit import JSON, Units, canonical_json
from molehunt.run.whole import write_whole

RUN_SCHEMA = 1
HASH = re.compile(r"[0-9a-f]{32,128}")
"""A setting that is the hash of a file or of texts."""
ANOTHER = "Give another folder (out, --out)."
LIBRARIES = ("molehunt", "torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "scipy")


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. Make it with `RunFolder.create`."""

    path: Path

    @classmethod
    def create(cls, path: Path, config: Mapping[str, JSON], *, overwrite: bool = False) -> "RunFolder":
        """Start a run in `path`, or resume the run there if it has the same config.

        Args:
            path: the folder, which is created if it does not exist.
            config: what determines the run; written to config.json.
            overwrite: replace the record of a run with another config. Finished units stay.

        Raises:
            UsageError: the folder cannot be made or written, holds a run with another config, or a config.json that
                belongs to no run.
        """
        run, record = cls(_writable(path)), canonical_json({"molehunt_run": RUN_SCHEMA, "config": config})
        present = path / "config.json"
        if os.path.lexists(present):
            theirs = _read_object(present)
            if "molehunt_run" not in theirs:
                raise UsageError(f"{_named(present)} does not belong to a Molehunt run. {ANOTHER}")
            if canonical_json(theirs) == record:
                return run
            if not overwrite:
                raise UsageError(
                    f"{_named(path)} holds a run with other settings ({_differing(theirs, json.loads(record))}).\n"
                    "Give another folder (out, --out), or repeat that run's settings to resume it."
                )
            (path / "metrics.jsonl").unlink(missing_ok=True)
        run.write_json("config.json", json.loads(record))
        return run

    @property
    def units(self) -> Units:
        """The units of this run: its hash-addressed work."""
        return Units(self.path / "units")

    @property
    def config(self) -> dict[str, JSON]:
        """The config this run was created with."""
        config = _read_object(self.path / "config.json")["config"]
        assert isinstance(config, dict)
        return config

    def write_text(self, name: str, text: str) -> Path:
        """Write `name` whole or not at all; a reader sees the old file or the new one."""
        return write_whole(self.path / name, text)

    def write_json(self, name: str, value: JSON) -> Path:
        """Write `value` as indented JSON with sorted keys, whole or not at all."""
        return self.write_text(name, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")

    def log(self, metrics: Mapping[str, JSON]) -> None:
        """Append one line to metrics.jsonl, with the time. NaN and infinity become null: JSON has neither."""
        row = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        line = canonical_json({**row, **{name: _finite(value) for name, value in metrics.items()}}) + "\n"
        how = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)  # a pipe there would wait for ever
        handle = os.open(self.path / "metrics.jsonl", how, 0o644)
        try:
            os.write(handle, line.encode())  # one write, so lines of two processes do not mix
        finally:
            os.close(handle)

    def write_env(self) -> Path:
        """Write env.json: everything that could change a number. It holds no user name, host name or path."""
        import torch

        versions = {name: _version(name) for name in LIBRARIES}
        return self.write_json(
            "env.json",
            {
                "python": platform.python_version(),
                "implementation": sys.implementation.name,
                "system": platform.system(),
                "machine": platform.machine(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "torch_build": str(torch.__version__),
                "commit": commit(),
                "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "libraries": versions,
            },
        )


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _finite(value: JSON) -> JSON:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _named(path: Path) -> str:
    return printable(str(path), 300)


def _writable(path: Path) -> Path:
    """`path` as a folder that can be written to. Raises UsageError where it cannot be made, or takes no file.

    It is tried before the work starts: an error after hours would come too late.
    """
    try:
        if path.exists() and not path.is_dir():
            raise UsageError(f"{_named(path)} is a file; a run needs a folder. {ANOTHER}")
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"x" * 4096)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UsageError(f"{_named(path)} cannot be written to: {printable(why)}. {ANOTHER}") from None
    return path


def _read_object(path: Path) -> dict[str, JSON]:
    if not path.is_file():
        return {}
    try:
        value: object = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):  # bad UTF-8 and bad JSON alike
        value = None
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else {}


def _differing(theirs: Mapping[str, JSON], ours: Mapping[str, JSON]) -> str:
    a, b = theirs.get("config"), ours["config"]
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return "an unknown layout"
    names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    return ", ".join(_difference(name, a.get(name), b.get(name)) for name in names) or "an older layout"


def _difference(name: str, theirs: JSON, ours: JSON) -> str:
    """One setting that differs. A hash says nothing to a reader, so its field alone is named."""
    if any(isinstance(value, str) and HASH.fullmatch(value) for value in (theirs, ours)):
        return f"another {printable(name, 60)}"
    return f"{printable(name, 60)}: {printable(repr(theirs), 200)} there, {printable(repr(ours), 200)} now"
