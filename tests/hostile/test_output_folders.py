"""An output folder that cannot be used is a usage error, before any work is done, and says what is wrong."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from molehunt.errors import UsageError
from molehunt.run.folder import RunFolder

CONFIG = {"command": "files"}


def a_file(at: Path) -> Path:
    at.write_text("x")
    return at


def below_a_file(at: Path) -> Path:
    return a_file(at) / "deeper" / "run"


def a_pipe(at: Path) -> Path:
    os.mkfifo(at)
    return at


def a_loop(at: Path) -> Path:
    at.symlink_to(at.name)
    return at


def holding(fill: Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        at.mkdir()
        fill(at / "config.json")
        return at

    return make


BAD: dict[str, Callable[[Path], Path]] = {
    "a file": a_file,
    "below a file": below_a_file,
    "a pipe": a_pipe,
    "a loop": a_loop,
    "a name that is too long": lambda at: at / ("x" * 300),
    "in /proc": lambda at: Path("/proc/nope/run"),
    "a zero byte": lambda at: Path(f"{at}\0x"),
    "garbage": holding(lambda file: file.write_bytes(b"\xff\xfe\0")),
    "too deep": holding(lambda file: file.write_bytes(b"[" * 100_000)),
    "not ours": holding(lambda file: file.write_text('{"model_type": "llama"}')),
    "a folder for a file": holding(lambda file: file.mkdir()),
    "a pipe for a file": holding(lambda file: os.mkfifo(file)),
    "a link to itself for a file": holding(lambda file: file.symlink_to(file.name)),
    "a huge number": holding(lambda file: file.write_text('{"molehunt_run": 1, "config": ' + "9" * 5000 + "}")),
    "a config that is a list": holding(lambda file: file.write_text('{"molehunt_run": 1, "config": [1]}')),
    "control characters": holding(lambda file: file.write_text('{"molehunt_run": 1, "config": {"\\u001b[2J": "\\u202e"}}')),
}  # fmt: skip


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_a_bad_place_is_a_usage_error(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        RunFolder.create(make(tmp_path / "out"), CONFIG)
    assert all(c.isprintable() or c == "\n" for c in str(raised.value))
    assert "(out)" in str(raised.value)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system of its own."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        at = tmp_path / f"disk{len(made)}"
        at.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small disk takes root and the right to mount: {done.stderr.strip()}")
        made.append(at)
        return at

    yield mount
    for at in made:
        subprocess.run(["umount", str(at)], check=True)


def test_a_disk_that_is_full_or_read_only_is_found_before_the_work(mounted: Callable[[str], Path]) -> None:
    full = mounted("size=8k")
    (full / "filler").write_bytes(b"x" * 8192)
    with pytest.raises(UsageError, match="No space left"):
        RunFolder.create(full / "run", CONFIG)
    with pytest.raises(UsageError, match="Read-only"):
        RunFolder.create(mounted("ro") / "run", CONFIG)


def test_a_disk_that_fills_during_the_work_is_an_error_of_the_system(mounted: Callable[[str], Path]) -> None:
    run = RunFolder.create(mounted("size=64k") / "run", CONFIG)
    with pytest.raises(OSError, match="No space left"):
        run.write_text("files.json", "x" * 100_000)
    assert [path.name for path in run.path.iterdir()] == ["config.json"], "no half of a file is left"


def test_a_pipe_in_place_of_the_log_of_metrics_does_not_wait_for_a_reader(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", CONFIG)
    os.mkfifo(run.path / "metrics.jsonl")
    with pytest.raises(OSError):
        run.log({"loss": 1.0})


def test_a_run_is_resumed_where_its_settings_are_the_same(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", CONFIG).log({"loss": 1.0})
    again = RunFolder.create(tmp_path / "run", CONFIG)
    assert again.config == CONFIG and json.loads((again.path / "metrics.jsonl").read_text())["loss"] == 1.0
    assert {path.name for path in again.path.iterdir()} == {"config.json", "metrics.jsonl"}
