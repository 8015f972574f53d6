"""The packages that users get, built once from a copy of this tree that is a clone of its own."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Packages:
    """A clone and what was built from it."""

    clone: Path
    commit: str
    wheel: Path
    sdist: Path
    rebuilt: Path
    """The wheel that the source package builds, outside any clone."""


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *command], capture_output=True, text=True, check=True
    ).stdout


def build_wheel(source: Path, into: Path) -> Path:
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(into)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = into.glob("*.whl")
    return wheel


def build_packages(folder: Path) -> Packages:
    """Wheel and source package of every file that git tracks or would track, as they stand in the tree now."""
    clone = folder / "clone"
    listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():  # a file that was removed stays listed until that is committed
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    git(clone, "init", "--quiet")
    git(clone, "add", "--all")
    git(clone, "commit", "--quiet", "--message", "the tree as it stands")
    wheel = build_wheel(clone, folder / "wheel")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=clone, check=True, stdout=subprocess.DEVNULL)
    (sdist,) = folder.glob("*.tar.gz")
    return Packages(
        clone, git(clone, "rev-parse", "HEAD").strip(), wheel, sdist, build_wheel(sdist, folder / "rebuilt")
    )
