"""The git commit that this installation was made from.

In a clone, git is called when the commit is needed. A package carries it in `commit.txt`, which setup.py writes during
the build. setup.py runs this file by itself, so the file imports nothing from Molehunt.
"""

import subprocess
from pathlib import Path

BAKED = Path(__file__).with_name("commit.txt")
CLONE = Path(__file__).parents[3]
"""The root of the clone, if this file lies in a clone."""


def commit() -> str | None:
    """The commit as `de99314a`, or `de99314a-dirty` where files differ from it. None when it is not known."""
    if BAKED.is_file():
        return BAKED.read_text(encoding="utf-8").strip() or None
    return commit_of(CLONE)


def commit_of(clone: Path) -> str | None:
    """The commit that `clone` has checked out. None unless `clone` is the root of a clone and git is installed."""
    if not (clone / ".git").exists():  # a file in a worktree; a folder above may be another project's clone
        return None
    command = ["git", "-C", str(clone), "describe", "--always", "--dirty", "--abbrev=8", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
