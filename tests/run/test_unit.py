import json
import logging
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.run import unit
from molehunt.run.unit import Units, canonical_json, file_hash, unit_key

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def write_text(text: str):
    return lambda folder: (folder / "text").write_text(text) and None


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=5))
def test_key_depends_on_the_values_and_not_on_their_order(config: dict[str, object]) -> None:
    backwards = dict(reversed(config.items()))
    assert unit_key(config, {}) == unit_key(backwards, {}) == unit_key(MappingProxyType(config), {})
    assert json.loads(canonical_json(config)) == config


def test_key_depends_on_config_inputs_schema_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [unit_key({"k": 1}, {"a": "x"}), unit_key({"k": 2}, {"a": "x"}), unit_key({"k": 1}, {"a": "y"})]
    keys.append(unit_key({"k": 1}, {"b": "x"}))
    monkeypatch.setattr(unit, "UNIT_SCHEMA", unit.UNIT_SCHEMA + 1)
    keys.append(unit_key({"k": 1}, {"a": "x"}))
    monkeypatch.setattr(unit, "__version__", "another")
    keys.append(unit_key({"k": 1}, {"a": "x"}))
    assert len(set(keys)) == 6
    assert all(len(key) == 64 for key in keys)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_key_of_what_json_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        unit_key({"x": value}, {})


def test_a_key_of_an_object_is_refused() -> None:
    with pytest.raises(TypeError, match="object has no JSON form"):
        unit_key({"x": object()}, {})


def test_a_finished_unit_is_not_made_again(tmp_path: Path) -> None:
    units, calls = Units(tmp_path / "new" / "units"), []

    def make(folder: Path) -> None:
        calls.append(list(folder.iterdir()))
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("one")

    assert not units.done("k")
    first = units.run("k", make)
    assert first == units.path("k") == units.run("k", make)
    assert calls == [[]], "made once, in an empty folder"
    assert units.done("k")
    assert [p.name for p in units.folder.iterdir()] == ["k"], "neither a lock nor a partial folder stays behind"
    listed = (first / "SHA256SUMS").read_text()
    assert listed == f"{file_hash(first / 'sub' / 'a')}  sub/a\n"


def remove_checksums(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


def flip_a_byte(folder: Path) -> None:
    (folder / "text").write_text("onf")


def remove_a_file(folder: Path) -> None:
    (folder / "text").unlink()


def add_a_file(folder: Path) -> None:
    (folder / "more").write_text("x")


def empty_everything(folder: Path) -> None:
    (folder / "text").unlink()
    (folder / "SHA256SUMS").write_text("")


def binary_checksums(folder: Path) -> None:
    (folder / "SHA256SUMS").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (remove_checksums, "no readable SHA256SUMS"),
        (binary_checksums, "no readable SHA256SUMS"),
        (flip_a_byte, "text has changed"),
        (remove_a_file, "missing or were added"),
        (add_a_file, "missing or were added"),
        (empty_everything, "missing or were added"),
    ],
)
def test_a_damaged_unit_is_named_and_made_again(spoil, why: str, tmp_path: Path, caplog) -> None:
    units = Units(tmp_path)
    before = tree(units.run("k", write_text("one")))
    spoil(units.path("k"))
    assert not units.done("k")
    with caplog.at_level(logging.WARNING):
        after = tree(units.run("k", write_text("one")))
    assert after == before
    assert why in caplog.text
    assert str(units.path("k")) in caplog.text


def test_a_failed_unit_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    units = Units(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "text").write_text("half")
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        units.run("k", fail)
    assert list(tmp_path.iterdir()) == []
    assert (units.run("k", write_text("one")) / "text").read_text() == "one"


def test_a_unit_that_writes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one file"):
        Units(tmp_path).run("k", lambda folder: None)
    assert not Units(tmp_path).done("k")


def test_json_reads_the_same_value_on_every_run(tmp_path: Path) -> None:
    units = Units(tmp_path)
    first = units.json("k", lambda: {"b": (1, 2.5), "a": None})
    again = units.json("k", lambda: pytest.fail("made twice"))
    assert first == again == {"a": None, "b": [1, 2.5]}


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    units, x = Units(tmp_path), torch.randn(3, 4)
    made = {"x": x.mT, "half": x.bfloat16(), "n": torch.arange(3)}
    first = units.tensors("k", lambda: made)
    again = units.tensors("k", lambda: pytest.fail("made twice"))
    for name, tensor in made.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(first[name], tensor) and torch.equal(again[name], tensor)


SHARED = """
import sys, time
from pathlib import Path
from molehunt.run.unit import Units
for key in ("a", "b", "c"):
    def make(folder):
        print(key, flush=True)
        for part in range(5):
            (folder / f"part{part}").write_text(key * 100)
            time.sleep(.01)
    Units(Path(sys.argv[1])).run(key, make)
"""


def test_processes_that_share_units_make_each_once(tmp_path: Path) -> None:
    start = [sys.executable, "-c", SHARED, str(tmp_path)]
    workers = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    made = "".join(worker.communicate(timeout=60)[0] for worker in workers)
    assert [worker.returncode for worker in workers] == [0] * 4
    assert sorted(made.split()) == ["a", "b", "c"], "the others waited and found it done"
    assert sorted(tree(tmp_path)) == sorted(
        f"{key}/{name}" for key in "abc" for name in ["SHA256SUMS", *(f"part{i}" for i in range(5))]
    )


WORK = """
import sys, time
from pathlib import Path
from molehunt.run.unit import Units, unit_key
units = Units(Path(sys.argv[1]))
print("ready", flush=True)
for i in range(40):
    def make(folder):
        for part in range(4):
            with (folder / f"part{part}").open("wb") as stream:
                for _ in range(8):
                    stream.write(bytes([i, part]) * 500)
                    stream.flush()
                    time.sleep(.0005)
    units.run(unit_key({"i": i}, {}), make)
print("done", flush=True)
"""


def test_kill_9_at_any_moment_loses_only_the_unit_in_flight(tmp_path: Path) -> None:
    def work(folder: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", WORK, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    assert work(tmp_path / "whole").communicate(timeout=60)[0] == "done\n"
    expected = tree(tmp_path / "whole")
    moments, killed, finished = random.Random(0), 0, {}
    for _ in range(15):
        process = work(tmp_path / "killed")
        time.sleep(moments.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        now = {name: data for name, data in tree(tmp_path / "killed").items() if ".partial" not in name}
        whole = {name: data for name, data in now.items() if not name.endswith(".lock")}
        assert whole.items() <= expected.items(), "under its final name a unit is whole"
        assert {name.split("/")[0] for name in whole} >= {name.split("/")[0] for name in finished}
        units = {name.split("/")[0] for name in whole}
        assert all(Units(tmp_path / "killed").done(key) for key in units)
        finished = whole
    assert killed >= 5
    assert work(tmp_path / "killed").communicate(timeout=60)[0] == "done\n"
    left = tree(tmp_path / "killed")
    assert {name: data for name, data in left.items() if not name.endswith(".lock")} == expected
    assert not any(data for name, data in left.items() if name.endswith(".lock")), "a dead lock is an empty file"
