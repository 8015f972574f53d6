import getpass
import json
import math
import os
import socket
import stat
from pathlib import Path

import pytest

from molehunt.errors import UsageError
from molehunt.run import folder as run_folder
from molehunt.run.commit import commit
from molehunt.run.folder import RunFolder


def test_the_same_config_resumes_the_run(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "a" / "run", {"k": 3, "sites": ["L0.mlp"]})
    run.log({"loss": 1.0})
    again = RunFolder.create(tmp_path / "a" / "run", {"sites": ["L0.mlp"], "k": 3})
    assert again == run
    assert again.config == {"k": 3, "sites": ["L0.mlp"]}
    assert (run.path / "metrics.jsonl").exists()
    assert run.units.folder == run.path / "units"


def test_another_config_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, {"k": 3, "seed": 0})
    with pytest.raises(UsageError, match=r"\(k: 3 there, 4 now\)"):
        RunFolder.create(tmp_path, {"k": 4, "seed": 0})
    assert RunFolder(tmp_path).config == {"k": 3, "seed": 0}


def test_of_settings_that_are_hashes_only_the_field_is_named(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, {"traffic": "a" * 64, "k": 3, "base": "c" * 64})
    with pytest.raises(UsageError, match=r"other settings \(k: 3 there, 4 now, another traffic\)"):
        RunFolder.create(tmp_path, {"traffic": "b" * 64, "k": 4, "base": "c" * 64})


def test_overwrite_replaces_the_record_and_keeps_the_units(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, {"k": 3})
    run.log({"loss": 1.0})
    run.units.json("u", lambda: 1)
    assert RunFolder.create(tmp_path, {"k": 4}, overwrite=True).config == {"k": 4}
    assert not (tmp_path / "metrics.jsonl").exists()
    assert run.units.done("u")


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "not json", "[1]", b"\xff"])
def test_a_strangers_config_is_never_overwritten(content: str | bytes, tmp_path: Path) -> None:
    held = tmp_path / "config.json"
    held.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = held.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="does not belong to a Molehunt run"):
            RunFolder.create(tmp_path, {}, overwrite=overwrite)
    assert held.read_bytes() == before


def test_a_run_of_another_schema_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder.create(tmp_path, {"k": 3})
    monkeypatch.setattr(run_folder, "RUN_SCHEMA", 2)
    with pytest.raises(UsageError, match="an older layout"):
        RunFolder.create(tmp_path, {"k": 3})
    (tmp_path / "config.json").write_text('{"molehunt_run": 1, "config": 5}')
    with pytest.raises(UsageError, match="an unknown layout"):
        RunFolder.create(tmp_path, {"k": 3})


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        RunFolder.create(tmp_path / "x", {})


def test_log_appends_whole_lines_in_order(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, {})
    for step in range(3):
        run.log({"step": step, "loss": math.nan if step == 1 else 0.5})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 0.5), (1, None), (2, 0.5)]
    assert all(row["time"].endswith("+00:00") for row in rows)


def test_writing_replaces_a_file_whole(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, {})
    run.write_text("sub/a.txt", "one\n")
    assert run.write_json("sub/a.txt", {"b": 1, "a": [2]}).read_text() == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'
    assert stat.S_IMODE((tmp_path / "sub" / "a.txt").stat().st_mode) == 0o644


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    run = RunFolder.create(tmp_path / "run", {})
    run.write_text("a.txt", "old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.write_text("a.txt", "new")
    assert (run.path / "a.txt").read_text() == "old"
    assert sorted(p.name for p in run.path.iterdir()) == ["a.txt", "config.json"]


def test_env_names_versions_and_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LIBRARIES", (*run_folder.LIBRARIES, "no-such-library"))
    text = RunFolder.create(tmp_path, {}).write_env().read_text()
    env = json.loads(text)
    assert env["libraries"]["torch"] and env["libraries"]["no-such-library"] is None
    assert env["commit"] == commit()
    assert env["threads"] >= 1 and env["python"].count(".") == 2
    assert socket.gethostname() not in text and str(Path.home()) not in text
    assert f'"{getpass.getuser()}"' not in text
