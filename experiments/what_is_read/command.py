"""Molehunt's own command line, run in this process with its output captured."""

import io
import json
import os
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molehunt.audit.plan import PLANS, Plan
from molehunt.cli.main import INTERNAL_ERROR, main

PLAN = Plan(
    name="quick", clean_prompts=60, traffic_limit=50, max_new_tokens=3, max_sites=2, directions=2, confirm_rows=4,
    random_controls=1, stress_rows=2, stress_steps=2,
)  # fmt: skip
"""Sizes of an audit here: the command and all that it does are the real ones, the evidence is as small as it can be."""
CODES = (0, 1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One command line and what came of it."""

    words: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def fault(self) -> str:
        """Why this is a fault whatever was asked; empty where there is none."""
        if self.code == INTERNAL_ERROR or "Traceback (most recent call last)" in self.err:
            return f"traceback: {self.last_line}"
        return "" if self.code in CODES else f"exit code {self.code}"

    @property
    def last_line(self) -> str:
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""

    @property
    def reason(self) -> str:
        """The message of an error: its first line."""
        payload = self.payload
        text = str(payload.get("error", "")) or self.err
        return next((line.strip() for line in text.splitlines() if line.strip()), "no message")

    @property
    def payload(self) -> dict[str, Any]:
        """What `--json` printed; empty where that is no object."""
        try:
            found = json.loads(self.out)
        except json.JSONDecodeError:
            return {}
        return found if isinstance(found, dict) else {}

    def shown(self) -> str:
        """The command line and its output, for whoever mends what is wrong."""
        return f"$ molehunt {' '.join(self.words)}\n[exit {self.code}]\n{self.err[-1500:]}\n{self.out[:1500]}"


def run(words: Sequence[str]) -> Ran:
    """Run `molehunt` with these arguments."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", newline="\n") for _ in range(2))
    code = 0
    with warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
        warnings.simplefilter("ignore")
        try:
            main(list(words))
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
    return Ran(words=tuple(words), code=code, out=written(out), err=written(err))


def written(stream: io.TextIOWrapper) -> str:
    """Everything that was written to a stream in memory."""
    stream.flush()
    stream.seek(0)
    return stream.read()


@contextmanager
def small_audits() -> Generator[None, None, None]:
    """The quick plan is `PLAN` inside the block."""
    before = PLANS["quick"]
    PLANS["quick"] = PLAN
    try:
        yield
    finally:
        PLANS["quick"] = before


@contextmanager
def hub_cache(folder: Path | None) -> Generator[None, None, None]:
    """Hub ids are looked up in this cache inside the block, without a network."""
    if folder is None:
        yield
        return
    from huggingface_hub import constants

    before = constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE
    variables = {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}
    kept = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(folder), True
    try:
        yield
    finally:
        constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = before
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
