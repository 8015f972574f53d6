"""Work on untrusted files in a forked child, under limits of time and memory.

A parser in C or Rust may hang, ask for all memory, or end its process when a file was made for that. In a child, only
the child ends. Forking costs milliseconds, because nothing is imported again.

The child can use the processor only: CUDA does not survive a fork. Linux holds all limits. macOS forks too, and does not
hold the limit of memory. Where there is no fork (Windows), the work runs in this process without limits, and only its
ordinary errors become InvalidInput.
"""

import contextlib
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from molehunt.errors import InvalidInput, MolehuntError, printable
from molehunt.run.forked import forked, interrupts_noted, limit_this_process, memory_again

MAX_RESULT = 64 * 2**20
"""Greatest number of bytes of a result as JSON."""
PATIENCE = 3
"""Seconds of wall time for each second of processor time: other work on the machine is no fault of the file."""
HUGE = b'{"huge": true}'
"""The answer in place of a larger one."""
NO_MEMORY = 77
"""Exit status of a child that had no memory left even to say so."""
_ADVICE = "Fetch it again, or do not use it."


class OutOfTime(InvalidInput):
    """Work on a file took longer than its limit."""


def bounded(work: Callable[[], Any], *, what: str, seconds: int | float = 10, megabytes: int = 1024) -> Any:
    """The result of `work()`, which runs in a forked child.

    What the child prints is thrown away, and nothing that it changes in memory is seen here.

    Args:
        work: returns something that JSON holds, of up to 64 MB. Tuples come back as lists, keys of maps as text.
        what: the file or folder that is read, for messages; it may come from an attacker.
        seconds: of processor time, rounded up to whole ones. Three times as much may pass on the clock.
        megabytes: how much memory the child may take beside what this process already holds.

    Raises:
        MolehuntError: the one that `work` raised, with its class and its text.
        OutOfTime: the limit of time was reached, which is an InvalidInput as well.
        InvalidInput: any other exception, a panic, a crash, a limit that was reached, or a result that is too large.
        TypeError: the result is nothing that JSON holds, which is a fault of the caller.
    """
    if not hasattr(os, "fork"):
        return _opened(_Ended(_answer(work), 0, late=False), what, float(seconds), megabytes)
    return _opened(_run_child(work, float(seconds), megabytes), what, float(seconds), megabytes)


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a child ended."""

    answer: bytes
    status: int
    """Exit status, or the negative number of the signal that ended it."""
    late: bool
    """Whether it was ended because the time was up."""


def _run_child(work: Callable[[], Any], seconds: float, megabytes: int) -> _Ended:
    reading, writing = os.pipe()
    answer: bytes | None = None
    try:
        with interrupts_noted() as noted:
            child = forked()
            if child == 0:
                _live_as_child(work, writing, seconds, megabytes)
        try:
            for number in noted[:1]:
                signal.raise_signal(number)
            os.close(writing)
            answer = _awaited(reading, time.monotonic() + PATIENCE * seconds)
        finally:  # whatever was raised here, such as KeyboardInterrupt, no child is left behind
            status = _end(child)
    finally:
        os.close(reading)
    return _Ended(answer or b"", status, late=answer is None)


def _live_as_child(work: Callable[[], Any], writing: int, seconds: float, megabytes: int) -> None:
    """Work, answer and exit. Never returns, and never runs what the parent registered for its own exit."""
    status = 1
    try:
        limit_this_process(writing, seconds, megabytes)
        rest = memoryview(_answer(work))
        while rest:
            rest = rest[os.write(writing, rest) :]
        status = 0
    except MemoryError:
        status = NO_MEMORY
    finally:
        os._exit(status)


def _answer(work: Callable[[], Any]) -> bytes:
    """What `work` returned or raised, as JSON. Exceptions of any kind are answers, too: a panic is no Exception."""
    try:
        result = work()
    except MolehuntError as error:
        memory_again()
        answer = {"class": type(error).__name__, "arguments": error.__reduce__()[1], "text": str(error)}
    except BaseException as error:
        memory_again()
        if isinstance(error, KeyboardInterrupt) and not hasattr(os, "fork"):
            raise
        answer = {"raised": type(error).__name__, "text": str(error)[:2000], "trace": traceback.format_exc()[-8000:]}
    else:
        answer = {"result": result}
    try:
        raw = json.dumps(answer).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raw = json.dumps({"fault": f"the result is nothing that JSON holds: {error}"}).encode()
    return raw if len(raw) <= MAX_RESULT else HUGE


def _awaited(reading: int, deadline: float) -> bytes | None:
    """What a child answers until it ends, or None if it is late."""
    answer = bytearray()
    ready = select.poll()  # select() cannot watch handles beyond 1023, which a server may have
    ready.register(reading, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        if not ready.poll(1000 * left):
            break
        part = os.read(reading, 1 << 20)
        answer += part
        if not part:
            return bytes(answer)
        if len(answer) > MAX_RESULT:
            return HUGE
    return None


def _end(child: int) -> int:
    """End `child` and what it started, if they still run, and wait for it: its exit status, or minus its signal."""
    for send in (os.killpg, os.kill):  # it has no group of its own before its first steps
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(child, signal.SIGKILL)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except ChildProcessError:  # this process ignores SIGCHLD, so nobody knows
        return 0


def _opened(ended: _Ended, what: str, seconds: float, megabytes: int) -> Any:
    """The result in a child's answer. Raises what `bounded` says."""
    name = printable(what)
    if ended.late or ended.status == -getattr(signal, "SIGXCPU", 24):
        raise OutOfTime(f"{name} could not be read within {seconds:g} seconds. {_ADVICE}")
    memory = InvalidInput(f"{name} could not be read within {megabytes} MB of memory. {_ADVICE}")
    if ended.status == NO_MEMORY:
        raise memory
    if ended.answer == HUGE:
        raise InvalidInput(f"{name} could not be read: what is in it takes more than {MAX_RESULT >> 20} MB. {_ADVICE}")
    if ended.status != 0 or not ended.answer:
        how = signal.Signals(-ended.status).name if ended.status < 0 else f"exit status {ended.status}"
        raise InvalidInput(f"{name} could not be read: the process that read it crashed ({how}). {_ADVICE}")
    answer: dict[str, Any] = json.loads(ended.answer)
    if "result" in answer:
        return answer["result"]
    if "class" in answer:
        raise _rebuilt(answer)
    if "fault" in answer:
        raise TypeError(answer["fault"])
    if answer["raised"] == "MemoryError":
        raise memory
    raised, text = printable(answer["raised"], 60), printable(" ".join(answer["text"].split()), 300)
    error = InvalidInput(f"{name} could not be read: {raised}: {text}\n{_ADVICE}")
    error.add_note(answer["trace"])
    raise error


def _rebuilt(answer: dict[str, Any]) -> MolehuntError:
    """The error that was raised in the child: its class is looked up here, and nothing is unpickled."""
    classes: list[type[MolehuntError]] = [MolehuntError]
    for found in classes:  # grows while it is walked
        classes += found.__subclasses__()
    arguments = [tuple(value) if isinstance(value, list) else value for value in answer["arguments"]]
    for found in classes:
        if found.__name__ == answer["class"]:
            try:
                return found(*arguments)
            except TypeError:
                break
    return InvalidInput(answer["text"])
