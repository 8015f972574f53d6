"""Ray runs the same units to the same bytes, and its failures read like ours."""

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molehunt.errors import NotTestable, ShapeMismatch, UsageError
from molehunt.run.local import LocalExecutor, WorkShard
from molehunt.run.ray import RayExecutor

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray leaves sockets and processes to be collected


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One cluster for all tests: starting it takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        found = pytest.importorskip("ray")
        found.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
        found.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield found
        found.shutdown()


def work(n: int) -> tuple[int, int]:
    if n == 13:
        raise ShapeMismatch("wq", (1, 2), (n,))
    if n == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    if n == 15:
        time.sleep(60)
    if n == 16:
        raise KeyError("ours")
    return n, n * n


def test_without_ray_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install .*\[ray\]', or use --executor local"):
        RayExecutor().map(work, [1], "working")


def test_units_come_back_in_order_and_by_shard(ray: Any) -> None:
    assert RayExecutor(workers=3).map(work, range(7), "working") == LocalExecutor().map(work, range(7), "working")
    assert RayExecutor(shard=WorkShard(2, 3)).map(work, range(7), "working") == [(1, 1), (4, 16)]
    assert RayExecutor().map(work, [], "working") == []
    assert ray.is_initialized(), "a cluster that was there before is left running"


def test_an_error_in_a_unit_arrives_as_itself(ray: Any) -> None:
    with pytest.raises(ShapeMismatch, match=r"wq is \[1, 2\] in the base and \[13\]"):
        RayExecutor().map(work, [1, 13], "working")
    with pytest.raises(KeyError, match="ours"):
        RayExecutor().map(work, [16], "working")


def test_a_lost_unit_is_told_without_a_fault_of_ours(ray: Any) -> None:
    with pytest.raises(NotTestable, match="working: Ray lost a unit"):
        RayExecutor().map(work, [14], "working")


def test_a_map_that_makes_no_progress_ends(ray: Any) -> None:
    begun = time.monotonic()
    with pytest.raises(NotTestable, match=r"working: no unit finished for 1 s on Ray .*\n.*--executor local"):
        RayExecutor(stall=1.0).map(work, [15], "working")
    assert time.monotonic() - begun < 30


def test_cells_of_a_benchmark_are_equal_byte_for_byte(
    ray: Any, bench_base: Path, bench_done: Path, tmp_path: Path
) -> None:
    from bench_samples import grid, seeds
    from molehunt.bench.run import jobs, run_cell

    chosen = grid(bench_base, parts=seeds(bench_base, 2))
    found = RayExecutor(workers=2).map(run_cell, jobs(chosen, tmp_path), "cells")
    local = LocalExecutor().map(run_cell, jobs(chosen, bench_done), "cells")
    assert json.dumps(found) == json.dumps(local)
    for one in found:
        name = f"{one['unit']}/value.json"
        assert (tmp_path / name).read_bytes() == (bench_done / name).read_bytes()
