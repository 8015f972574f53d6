"""Environments outside the clone: the libraries of this one, and of Molehunt only what a test installs."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

NOT_LINKED = ("molehunt", "__editable__", "pip", "_virtualenv")


def fresh_environment(folder: Path, *, with_pip: bool = False) -> Path:
    """Make a virtual environment in `folder` that sees this one's libraries through links. Returns its Python.

    Links rather than this environment's own folder on the path: that would bring the clone's Molehunt along.
    """
    subprocess.run([sys.executable, "-m", "venv", *([] if with_pip else ["--without-pip"]), str(folder)], check=True)
    libraries = folder / "libraries"
    libraries.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(NOT_LINKED):
            (libraries / path.name).symlink_to(path)
    (site,) = (folder / "lib").glob("python*/site-packages")
    for path in site.glob("setuptools*"):  # Python 3.11 brings an old one, which would hide the linked one
        shutil.rmtree(path)
    (site / "libraries.pth").write_text(f"{libraries}\n")
    return folder / "bin" / "python"


def install(python: Path, *packages: str) -> None:
    """Install package files into the environment of `python`, without any index."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, *packages], check=True)
