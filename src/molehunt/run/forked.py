"""Forks a process that threads of torch and tokenizers may share, and puts limits on the child."""

import contextlib
import ctypes
import faulthandler
import gc
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Generator
from pathlib import Path

PARALLEL = "TOKENIZERS_PARALLELISM"
"""Variable that tells the threads of tokenizers to stay away: they would wait for ever for threads lost by a fork."""
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux."""
_one_at_a_time = threading.RLock()


def forked() -> int:
    """The child's process id in the parent, and 0 in the child, as os.fork says.

    The threads of tokenizers stay off in the child.
    """
    with _one_at_a_time, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)  # the child starts no other thread
        before = os.environ.get(PARALLEL)
        os.environ[PARALLEL] = "false"
        child = -1
        try:
            child = os.fork()
        finally:
            if child != 0:
                os.environ.pop(PARALLEL)
                if before is not None:
                    os.environ[PARALLEL] = before
        return child


@contextlib.contextmanager
def interrupts_noted() -> Generator[list[int]]:
    """Note Ctrl-C instead of acting on it: Python drops one that falls into its own steps around a fork.

    Whoever finds a note raises the signal again. Only the main thread is ever interrupted, so only there something is done.
    """
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield noted
        return
    signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def limit_this_process(answers_to: int, seconds: float, megabytes: int) -> None:
    """Make this freshly forked child silent, single-threaded, and bound in time and memory.

    Args:
        answers_to: the handle that stays open for the answer.
        seconds: of processor time.
        megabytes: of address space beyond what it holds now.
    """
    os.setsid()  # Ctrl-C goes to the parent, which ends this child; so does the parent's death
    faulthandler.disable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        if standard != answers_to:
            os.dup2(nothing, standard)
    sys.stdout = sys.stderr = os.fdopen(nothing, "w")  # pytest and notebooks put files of their own there
    gc.freeze()  # what the parent holds is not walked, so its pages stay shared
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # the others were lost by the fork, and waiting for them would hang
    _set_limits(seconds, megabytes)


def _set_limits(seconds: float, megabytes: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    whole = math.ceil(seconds)
    _lower(resource.RLIMIT_CPU, whole)
    status = Path("/proc/self/statm")
    if status.exists():  # elsewhere, the size now is not known, and macOS holds no such limit
        held = int(status.read_text().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, held + megabytes * 2**20)


def _lower(kind: int, value: int) -> None:
    """Lower a soft limit, within the hard one, which stays."""
    import resource

    soft, hard = resource.getrlimit(kind)
    others = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(kind, (min([value, *others]), hard))


def memory_again() -> None:
    """Lift the limit of memory, so that a child that ran out of it can still say so."""
    if sys.platform != "linux":
        return
    import resource

    with contextlib.suppress(ValueError, OSError):
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
