"""Work in a child process, so that a crash there is a result and not the end."""

import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

POLL_S = 0.02


def isolated(work: Callable[[], dict[str, Any]], *, seconds: float) -> dict[str, Any]:
    """What `work` returns in a forked child, or `{"crashed": why}` where it did not return.

    Args:
        work: gives something that JSON can hold.
        seconds: time after which the child is killed.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside idle threads of torch
            child = os.fork()
        if child == 0:
            _run(work, Path(file.name))
        status = _wait(child, seconds)
        if status is None:
            return {"crashed": f"it took more than {seconds:g} s"}
        content = Path(file.name).read_text(encoding="utf-8")
    if os.WIFSIGNALED(status):
        return {"crashed": f"it was ended by {signal.Signals(os.WTERMSIG(status)).name}"}
    return json.loads(content) if content else {"crashed": f"it left with exit code {os.WEXITSTATUS(status)}"}


def _run(work: Callable[[], dict[str, Any]], file: Path) -> None:
    code = 1
    try:
        faulthandler.disable()
        found = work()
        file.write_text(json.dumps(found), encoding="utf-8")
        code = 0
    except BaseException:
        file.write_text(json.dumps({"crashed": traceback.format_exc()[-3000:]}), encoding="utf-8")
    finally:
        os._exit(code)


def _wait(child: int, seconds: float) -> int | None:
    """The child's wait status; None if it had to be killed."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(POLL_S)
