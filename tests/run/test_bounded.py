"""Reading in a child process: what ends the child never ends this process, and is told by the name of the file."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import tokenizers

from molehunt.errors import InvalidInput, MolehuntError, NotTestable, ShapeMismatch, UsageError
from molehunt.run.bounded import MAX_RESULT, bounded


def _raiser(error: BaseException) -> Callable[[], Any]:
    def work() -> None:
        raise error

    return work


def test_a_result_comes_back_as_json_holds_it() -> None:
    value = {"a": [1, 2.5, None, True], "\ud800": "lone surrogates and\0zeros, too"}
    assert bounded(lambda: value, what="x") == value
    assert bounded(lambda: (1, (2,)), what="x") == [1, [2]]


def test_a_large_result_passes_through_the_pipe() -> None:
    assert len(bounded(lambda: "x" * 5_000_000, what="x")) == 5_000_000


def test_what_the_child_prints_and_changes_stays_there(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []

    def work() -> int:
        print("from Python")
        os.write(2, b"from C\n")
        seen.append(1)
        os.environ["MOLEHUNT_CHILD"] = "1"
        return len(seen)

    assert bounded(work, what="x") == 1
    assert (seen, os.environ.get("MOLEHUNT_CHILD")) == ([], None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error", [UsageError("use\nit"), NotTestable("é \ud800"), InvalidInput("x"), ShapeMismatch("w", (2, 3), (4,))]
)
def test_an_error_for_the_user_keeps_class_and_text(error: MolehuntError) -> None:
    with pytest.raises(MolehuntError) as caught:
        bounded(_raiser(error), what="x")
    assert (type(caught.value), str(caught.value)) == (type(error), str(error))


def test_an_error_raised_while_another_is_handled_is_the_one_that_counts() -> None:
    def work() -> None:
        try:
            {}["key"]
        except KeyError as error:
            raise NotTestable("the second") from error

    with pytest.raises(NotTestable, match=r"\Athe second\Z"):
        bounded(work, what="x")


@pytest.mark.parametrize("error", [KeyError("k"), RecursionError("deep"), SystemExit(3), re.error("bad")])
def test_any_other_exception_is_invalid_input_that_names_the_file(error: BaseException) -> None:
    with pytest.raises(InvalidInput, match=r"tok\\x1b.json could not be read: \w+: ") as caught:
        bounded(_raiser(error), what="tok\x1b.json")
    assert "in work" in caught.value.__notes__[0], "the trace of the child must be kept for developers"


def test_a_panic_of_rust_is_invalid_input() -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "##"}
    with pytest.raises(InvalidInput, match=r"t.json could not be read: PanicException: "):
        bounded(lambda: tokenizers.Tokenizer.from_str(json.dumps({"model": model})).encode("ab").ids, what="t.json")


def _endless() -> None:
    while True:
        pass


def _endless_in_c() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")  # holds the interpreter's lock


@pytest.mark.parametrize("work", [_endless, _endless_in_c])
def test_work_without_end_is_ended(work: Callable[[], None]) -> None:
    with pytest.raises(InvalidInput, match="w could not be read within 1 seconds"):
        bounded(work, what="w", seconds=1)


def test_work_that_waits_is_ended_by_the_clock() -> None:
    begun = time.monotonic()
    with pytest.raises(InvalidInput, match=r"within 0.2 seconds"):
        bounded(lambda: time.sleep(60), what="w", seconds=0.2)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "work", [lambda: len(bytearray(10 * 2**30)), lambda: numpy.ones(10 * 2**27).sum(), lambda: ["x" * i for i in range(10**6)]]
)  # fmt: skip
def test_work_that_asks_for_all_memory_is_refused(work: Callable[[], Any]) -> None:
    with pytest.raises(InvalidInput, match=r"w could not be read within 100 MB of memory"):
        bounded(work, what="w", megabytes=100)


def test_the_limit_of_memory_counts_from_what_this_process_holds() -> None:
    held = bytearray(300 * 2**20)
    assert bounded(lambda: len(bytearray(50 * 2**20)), what="w", megabytes=100) == 50 * 2**20
    assert held


@pytest.mark.parametrize("work", [os.abort, lambda: ctypes.string_at(8), lambda: os.kill(os.getpid(), signal.SIGKILL)])
def test_a_crash_is_told_with_its_signal(work: Callable[[], Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInput, match=r"w could not be read: .* crashed \(SIG(ABRT|SEGV|KILL)\)"):
        bounded(work, what="w")
    assert capfd.readouterr().err == ""


def test_a_child_that_exits_without_an_answer_gave_no_answer() -> None:
    with pytest.raises(InvalidInput, match=r"crashed \(exit status 0\)"):
        bounded(lambda: os._exit(0), what="w")


def test_a_huge_result_is_refused() -> None:
    with pytest.raises(InvalidInput, match="takes more than 64 MB"):
        bounded(lambda: "x" * (MAX_RESULT + 1), what="w")


def test_a_result_that_is_no_json_is_a_fault_of_the_caller() -> None:
    with pytest.raises(TypeError, match="nothing that JSON holds"):
        bounded(lambda: {1, 2}, what="w")


def test_a_child_may_bound_its_own_work() -> None:
    def work() -> str:
        try:
            bounded(os.abort, what="inner")
        except InvalidInput as error:
            return str(error)
        return ""

    assert "inner could not be read" in bounded(work, what="outer")


def test_torch_and_tokenizers_work_in_a_child_of_a_process_whose_threads_they_used() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        warm = torch.ones(700, 700) @ torch.ones(700, 700)  # starts the threads
        found = bounded(lambda: float((torch.ones(700, 700) @ torch.ones(700, 700)).max()), what="w")
    finally:
        torch.set_num_threads(before)
    assert found == float(warm.max()) == 700
    model = tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.encode_batch(["a"] * 100)
    environment = dict(os.environ)
    assert bounded(lambda: tokenizer.encode_batch(["a"] * 100)[99].ids, what="w") == [0]
    assert dict(os.environ) == environment


def test_threads_may_bound_work_at_the_same_time() -> None:
    found: list[int] = []

    def ask(number: int) -> None:
        found.append(bounded(lambda: number, what="w"))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(8))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_this_process_is_the_end_of_the_child(tmp_path: Path, number: signal.Signals) -> None:
    told = tmp_path / "pid"
    script = (
        "import os, signal, time\nfrom pathlib import Path\nfrom molehunt.run.bounded import bounded\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"def work():\n    Path({str(told)!r}).write_text(str(os.getpid()))\n    time.sleep(60)\n"
        "bounded(work, what='w', seconds=30)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    for _ in range(1000):
        if told.exists() and told.read_text():
            break
        time.sleep(0.02)
    child = int(told.read_text())
    parent.send_signal(number)
    parent.wait(20)
    for _ in range(500):
        if not _runs(child):
            return
        time.sleep(0.02)
    pytest.fail("the child outlives its parent")


def _runs(process: int) -> bool:
    """Whether a process runs; one that waits to be collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_interrupt_that_falls_into_a_fork_is_not_lost() -> None:
    """Python drops what is raised in the steps that it runs around a fork; the second reading is not interrupted."""
    pressed = [signal.SIGINT]
    os.register_at_fork(after_in_parent=lambda: signal.raise_signal(pressed.pop()) if pressed else None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore interrupts
    try:
        with pytest.raises(KeyboardInterrupt):
            bounded(lambda: 1, what="x")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        assert bounded(lambda: 1, what="x") == 1
    finally:
        signal.signal(signal.SIGINT, before)
