"""A sample of wrong inputs of every kind ends with an exit code of the contract; `make contract` tries all of them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAMPLE = 40
"""How many inputs: each takes about a third of a second."""


def test_a_sample_of_wrong_inputs_keeps_the_contract() -> None:
    """In a process of its own, which has one thread and can fork; a finding is a line that says which input it was."""
    words = [sys.executable, "-W", "ignore", "-m", "tests.contract", "--sample", str(SAMPLE), "--seed", "1"]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert f"{SAMPLE} tried, 0 broken" in done.stdout
