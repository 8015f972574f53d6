"""What pyproject.toml cannot say: a package names the git commit that it was built from (molehunt/run/commit.py)."""

import os
import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
COMMIT = "molehunt/run/commit.txt"


def write_commit(package_root: Path) -> None:
    """Write the commit below `package_root`, outside the clone. MOLEHUNT_COMMIT is for builds that lack `.git`."""
    commit_of = runpy.run_path(str(ROOT / "src" / "molehunt" / "run" / "commit.py"))["commit_of"]
    commit = os.environ.get("MOLEHUNT_COMMIT") or commit_of(ROOT)
    if commit:  # else a source package may carry its own, which is then copied like any other file
        (package_root / COMMIT).unlink(missing_ok=True)  # it may be a hard link to the source's own
        (package_root / COMMIT).write_text(commit + "\n", encoding="utf-8")


class BuildWithCommit(build_py):
    """Copies the package's files, and adds the commit."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable installation asks git each time
            write_commit(Path(self.build_lib))


class SourceWithCommit(sdist):
    """Copies the source tree, and adds the commit."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir) / "src")


setup(cmdclass={"build_py": BuildWithCommit, "sdist": SourceWithCommit})
