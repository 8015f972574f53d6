import os
import signal
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehunt.errors import NotTestable, ShapeMismatch, UsageError
from molehunt.run.local import LocalExecutor, WorkShard

SHARDS = st.integers(1, 50).flatmap(lambda count: st.builds(WorkShard, st.integers(1, count), st.just(count)))


@given(SHARDS)
def test_a_shard_reads_back_as_itself(shard: WorkShard) -> None:
    assert WorkShard.parse(str(shard)) == shard


@given(st.integers(1, 20), st.integers(0, 100))
def test_shards_share_the_work_evenly_and_completely(count: int, n: int) -> None:
    shares = [[i for i in range(n) if WorkShard(k, count).mine(i)] for k in range(1, count + 1)]
    assert sorted(i for share in shares for i in share) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "a/b", "-1/4", "1/0", "1/4/8", " 1/4", "１/４", "1/4\n"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        WorkShard.parse(text)


def test_map_runs_its_shard_in_order_and_tracks_it() -> None:
    calls: list[object] = []

    def track(items: Iterable[int], what: str, total: int | None = None) -> Iterable[int]:
        calls.append((what, total))
        for item in items:
            calls.append(item)
            yield item

    doubled = LocalExecutor(WorkShard(2, 3), track).map(lambda n: 2 * n, range(8), "doubling")
    assert doubled == [2, 8, 14]
    assert calls == [("doubling", 3), 1, 4, 7]
    assert LocalExecutor().map(str, [3, 1], "printing") == ["3", "1"]


def test_the_first_exception_ends_the_map() -> None:
    seen: list[int] = []

    def work(n: int) -> None:
        seen.append(n)
        if n == 2:
            raise RuntimeError("two")

    with pytest.raises(RuntimeError, match="two"):
        LocalExecutor().map(work, [1, 2, 3], "working")
    assert seen == [1, 2]


def worked(n: int) -> tuple[int, int]:
    """A unit that other processes can be given; some fail in their own way."""
    if n == 13:
        raise ShapeMismatch("wq", (1, 2), (n,))
    if n == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    return n, n * n


def test_workers_return_what_one_process_returns_in_order() -> None:
    calls: list[object] = []

    def track(items: Iterable[int], what: str, total: int | None = None) -> Iterable[int]:
        calls.append((what, total))
        yield from items

    units = [3, 1, 2, 0, 5, 4]
    alone = LocalExecutor().map(worked, units, "squaring")
    assert LocalExecutor(track=track, workers=2).map(worked, units, "squaring") == alone
    assert calls == [("squaring", 6)]


def test_an_error_in_a_worker_arrives_as_itself() -> None:
    with pytest.raises(ShapeMismatch, match=r"wq is \[1, 2\] in the base and \[13\]"):
        LocalExecutor(workers=2).map(worked, [1, 13], "working")


def test_a_killed_worker_is_no_fault_of_ours() -> None:
    with pytest.raises(NotTestable, match=r"working: a worker process was killed.*\n.*fewer --workers"):
        LocalExecutor(workers=2).map(worked, [1, 14], "working")
