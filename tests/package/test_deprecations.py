"""Whose deprecations fail a test: everybody's on the lock, ours alone on other versions."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAISED = """
import warnings

CODE = "def call(): import warnings; warnings.warn('this goes away', {kind}, stacklevel={stacklevel})"

def raised_by(module, kind="DeprecationWarning", stacklevel=1):
    names = {"__name__": module}
    exec(CODE.format(kind=kind, stacklevel=stacklevel), names)
    return names["call"]

def asked_by(module, function):
    exec("function()", {"__name__": module, "function": function})

def test_it():
    """
OURS = [
    "raised_by('molehunt.steer')()",
    "raised_by('molehunt.steer', 'FutureWarning')()",
    "raised_by('molehunt.steer', stacklevel=2)()",
    "asked_by('somebody', raised_by('molehunt.steer', stacklevel=2))",
    "asked_by('molehunt.steer', lambda: warnings.warn('behave', UserWarning))",
    "raised_by('transformers.utils', 'UserWarning')()",
]
"""What fails always. The last is no deprecation: another library has something to say about our call."""
THEIRS = [
    "raised_by('transformers.utils', 'FutureWarning')()",
    "raised_by('transformers.utils', 'PendingDeprecationWarning')()",
    "asked_by('molehunt.steer', raised_by('transformers.utils', 'FutureWarning', stacklevel=2))",
    "asked_by('somebody', lambda: warnings.warn_explicit('raised in C', DeprecationWarning, 'x.py', 1, 'somebody'))",
]
"""What fails on the lock alone."""


@pytest.mark.parametrize(
    ("mode", "failing"),
    [([], OURS + THEIRS), (["-p", "tests.foreign_deprecations"], OURS)],
    ids=["lock", "other versions"],
)
def test_our_deprecations_always_fail_and_others_on_the_lock_alone(
    mode: list[str], failing: list[str], tmp_path: Path
) -> None:
    for i, call in enumerate(OURS + THEIRS):
        (tmp_path / f"test_{i}.py").write_text(RAISED + call)
    done = subprocess.run(
        # The project's settings, without its conftest.py
        [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-o", "addopts=", "-q", *mode, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    failed = [call for i, call in enumerate(OURS + THEIRS) if f"FAILED test_{i}.py::" in done.stdout]
    assert failed == failing, done.stdout
