"""One command on one input, run in a forked child and judged: what came out, how it ended, and what it took."""

import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CODES = {0, 1, 2, 3, 4}
SECONDS, MEGABYTES = 10, 1024
"""What an input of a seed model may take: processor time, and memory beyond a good input's."""
HANG = 45
"""Seconds on the clock after which a child is ended: this machine does other work, too."""
ROOM = 6 << 30
"""Address space that a child may take in all beside what it starts with: a guard for this machine, not a limit."""
BAD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")
"""Characters that no output may have; line breaks and tabs it may."""
FOUND = re.compile(r"flagged|finding", re.IGNORECASE)


@dataclass(frozen=True)
class Outcome:
    """How one command ended."""

    code: int
    """Exit code, or minus the signal that ended it."""
    out: str
    err: str
    seconds: float
    """Processor time, also of its children."""
    megabytes: float
    hung: bool

    def faults(self, idle: float) -> list[str]:
        """What breaks the contract; `idle` is the memory in MB that a good input takes."""
        found: list[str] = []
        if self.hung:
            return [f"no end within {HANG} s"]
        if self.code not in CODES:
            found.append(f"exit code {self.code}")
        if "Traceback (most recent call last)" in self.err or "Traceback (most recent call last)" in self.out:
            found.append("a traceback")
        if self.code == 1 and not FOUND.search(self.out):
            found.append("exit code 1 without a finding")
        if self.code > 1 and not (self.err + self.out).strip():
            found.append("an error without a message")
        if self.seconds > SECONDS:
            found.append(f"{self.seconds:.0f} s of processor time")
        if self.megabytes > idle + MEGABYTES:
            found.append(f"{self.megabytes - idle:.0f} MB more than a good input")
        if wild := BAD.search(self.out) or BAD.search(self.err):
            found.append(f"U+{ord(wild.group()):04X} in the output")
        return found


def tried(argv: Sequence[str], folder: Path) -> Outcome:
    """Run `molehunt` with these words in a child that works in `folder`."""
    out, err = folder / ".stdout", folder / ".stderr"
    child = os.fork()  # this process has one thread
    if child == 0:
        _live(list(argv), folder, out, err)
    deadline, hung = time.monotonic() + HANG, False
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            hung = True
            os.killpg(child, signal.SIGKILL)
            _, status, used = os.wait4(child, 0)
            break
        time.sleep(0.005)
    return Outcome(
        code=os.waitstatus_to_exitcode(status),
        out=out.read_bytes().decode(errors="replace"),
        err=err.read_bytes().decode(errors="replace"),
        seconds=used.ru_utime + used.ru_stime,
        megabytes=used.ru_maxrss / 1024,
        hung=hung,
    )


def _live(argv: list[str], folder: Path, out: Path, err: Path) -> None:
    """Be the command, and exit as Python would. Never returns."""
    os.setsid()
    code = 99
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        resource.setrlimit(resource.RLIMIT_FSIZE, (512 << 20, 512 << 20))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
        os.chdir(folder)
        for number, path, how in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
            os.dup2(os.open(path, how | os.O_CREAT | os.O_TRUNC if number else how, 0o644), number)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, "r" if i == 0 else "w", encoding="utf-8") for i in (0, 1, 2))
        sys.argv = ["molehunt", *argv]
        from molehunt.cli.main import main

        try:
            main(argv)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 0xFF)
