"""When the lines of a real audit come, on the clock of whoever waits for it."""

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise

import pytest

from molehunt.audit.plan import Plan
from molehunt.organism.seed_model import seed_path

PLAN = Plan(
    name="quick", clean_prompts=240, traffic_limit=60, max_new_tokens=8, max_sites=2, directions=2, confirm_rows=6,
    random_controls=2, stress_rows=4, stress_steps=5,
)  # fmt: skip
AUDIT = """
import sys
import time
from molehunt.audit import plan, readings, scan
from molehunt.audit.plan import Plan
from molehunt.cli import console
from molehunt.cli.main import main
from molehunt.model.pair import ModelPair
plan.PLANS["quick"] = {plan}
console.EVERY = 1.0
scan.LOGIT_BYTES = 2**23  # a few rows at a time
read, whole = ModelPair.read, readings.scan
def slowly(*arguments, **named):
    time.sleep(0.35)  # as if the models were large
    return read(*arguments, **named)
def marked(*arguments, what, **named):
    console.say(f"started: {{what}}")
    found = whole(*arguments, what=what, **named)
    console.say(f"ended: {{what}}")
    return found
ModelPair.read, readings.scan = slowly, marked
main(["audit", *sys.argv[1:]])
"""
LATE = 1.5
"""Seconds that a line may come late on a machine that does other things too."""


@dataclass
class Line:
    at: float
    text: str


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    """What an audit of a seed model against itself says on stderr, each with its time."""
    seed = str(seed_path("seed-s"))
    command = [sys.executable, "-c", AUDIT.format(plan=PLAN), seed, seed]
    command += ["--out", str(tmp_path_factory.mktemp("audit") / "run")]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = [Line(time.monotonic() - started, text.rstrip("\n")) for text in process.stderr]
    assert process.returncode == 0, found
    return found


@pytest.mark.parametrize("what", ["scanning clean prompts", "scanning traffic"])
def test_a_scan_says_rows_speed_and_time_left_from_the_second_second_on(lines: list[Line], what: str) -> None:
    started = next(line.at for line in lines if line.text == f"started: {what}")
    ended = next(line.at for line in lines if line.text == f"ended: {what}")
    printed = [line for line in lines if line.text.startswith(what)]
    assert started + 2 - 0.1 <= printed[0].at <= started + 2 + LATE
    assert all(started <= line.at <= ended for line in printed)
    times = [printed[0].at, *(line.at for line in printed), ended]
    assert max(later - earlier for earlier, later in pairwise(times)) < 1 + LATE
    shown = [re.fullmatch(rf"{what}: (\d+) of 240 rows(, [\d.]+ rows/(?:s|min))?, \d+ s (left|so far)", line.text)
             for line in printed]  # fmt: skip
    assert all(shown), printed
    done = [int(one[1]) for one in shown if one is not None]
    assert done == sorted(done) and len(set(done) - {0, 240}) > 2, "it moves inside the unit of 256 rows"
    last = shown[-1]
    assert last is not None and last[2] and last[3] == "left"


def test_nothing_else_is_said_while_quick_steps_pass(lines: list[Line]) -> None:
    names = {line.text.split(":")[0] for line in lines}
    assert names <= {"starting", "loading seed-s and seed-s", "started", "ended", "scanning clean prompts",
                     "scanning traffic", "comparing weights", "hashing both folders", "", "report"}  # fmt: skip
