"""What users install is what was tested: the packages hold the tree's files, and their commands run elsewhere."""

import email
import json
import os
import signal
import subprocess
import tarfile
import time
import tomllib
import zipfile
from email.message import Message
from functools import partial
from pathlib import Path

import pytest
from built_packages import Packages, git

from molehunt import __version__

COMMIT = "molehunt/run/commit.txt"
TRAINING = "training the clean twin"
"""The one file that is in the packages and not in the tree."""


def tracked_sources(packages: Packages) -> set[str]:
    """Every file below src/ that git tracks, as it is named in a wheel."""
    return {name.removeprefix("src/") for name in git(packages.clone, "ls-files", "src").splitlines()}


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def run(molehunt: Path, folder: Path, *command: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(molehunt), *command], capture_output=True, text=True, cwd=folder, env=offline(), timeout=seconds
    )


def offline() -> dict[str, str]:
    """This environment without what would lead Python back to the clone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV", "COVERAGE"))}
    return kept | {"HF_HUB_OFFLINE": "1"}


def test_the_wheel_holds_every_tracked_file_of_the_package_and_no_other(packages: Packages) -> None:
    assert wheel_files(packages.wheel) == tracked_sources(packages) | {COMMIT}
    with zipfile.ZipFile(packages.wheel) as archive:
        for name in tracked_sources(packages):
            assert archive.read(name) == (packages.clone / "src" / name).read_bytes(), name


def test_the_source_package_holds_them_and_builds_the_same_wheel(packages: Packages) -> None:
    with tarfile.open(packages.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    sources = {name.removeprefix("src/") for name in names if name.startswith("src/molehunt/")}
    assert sources == tracked_sources(packages) | {COMMIT}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"} <= names
    assert not [name for name in names if name.startswith(("tests/", "."))]
    assert wheel_files(packages.rebuilt) == wheel_files(packages.wheel)


def test_the_packages_name_their_commit_and_leave_the_clone_clean(packages: Packages) -> None:
    for wheel in (packages.wheel, packages.rebuilt):
        with zipfile.ZipFile(wheel) as archive:
            assert archive.read(COMMIT).decode().strip() == packages.commit[:8]
    assert git(packages.clone, "status", "--porcelain") == ""


def test_the_metadata_says_where_things_are(packages: Packages) -> None:
    project = tomllib.loads((packages.clone / "pyproject.toml").read_text())["project"]
    said = metadata_of(packages.wheel)
    assert said["Version"] == __version__ == project["version"]
    assert said["License-Expression"] == "Apache-2.0" and said.get_all("License-File") == ["LICENSE"]
    assert said["Requires-Python"] == project["requires-python"]
    assert dict(line.split(", ") for line in said.get_all("Project-URL", [])) == project["urls"]
    assert {"Homepage", "Repository", "Changelog", "Issues"} <= project["urls"].keys()
    assert project["urls"]["Changelog"].endswith("/CHANGELOG.md") and (packages.clone / "CHANGELOG.md").is_file()
    assert set(said.get_all("Classifier", [])) == set(project["classifiers"])
    assert set(said.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    with zipfile.ZipFile(packages.wheel) as archive:
        (licence,) = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
        assert archive.read(licence) == (packages.clone / "LICENSE").read_bytes()


def test_the_installed_command_is_the_wheels(packages: Packages, installed: Path, tmp_path: Path) -> None:
    shown = run(installed, tmp_path, "--version")
    assert shown.stdout == f"molehunt {__version__} (commit {packages.commit[:8]})\n"
    where = "import molehunt, transformers; print(molehunt.__file__)"
    python = installed.with_name("python")
    found = subprocess.run([python, "-c", where], capture_output=True, text=True, cwd=tmp_path, env=offline())
    assert Path(found.stdout.strip()).is_relative_to(installed.parents[1] / "lib"), found.stderr


def test_doctor_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    shown = run(installed, tmp_path, "doctor", "--json")
    facts = json.loads(shown.stdout)
    assert shown.returncode == 0 and facts["molehunt"] == __version__
    assert facts["newer than tested"] is not None


def test_files_runs_from_the_wheel_on_its_own_seed_models(installed: Path, tmp_path: Path) -> None:
    (seed,) = (installed.parents[1] / "lib").glob("python*/site-packages/molehunt/organism/seeds/seed-s")
    assert (seed / "chat_template.jinja").is_file()
    compared = run(installed, tmp_path, "files", str(seed), str(seed))
    assert compared.returncode == 0, compared.stderr


@pytest.mark.slow
def test_the_demo_starts_from_the_wheel_and_can_be_stopped(installed: Path, tmp_path: Path) -> None:
    """Run it until the first model is planted and the second is in training, which is about its first minute.

    Not while files are read: there, C code of other packages may turn an interrupt into an error of its own.
    """
    log = tmp_path / "log.txt"
    planted = tmp_path / "out" / "organism" / "model.safetensors"
    with log.open("w") as stderr:
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background may ignore interrupts
        command = [installed, "demo", "--out", "out"]
        demo = subprocess.Popen(command, stderr=stderr, cwd=tmp_path, env=offline(), preexec_fn=heard)
    try:
        until = time.monotonic() + 300
        while TRAINING not in log.read_text() and demo.poll() is None and time.monotonic() < until:
            time.sleep(0.5)
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 130, log.read_text()
    finally:
        demo.kill()
        demo.wait()
    assert planted.is_file(), log.read_text()
    assert "Planting:" in log.read_text() and "Traceback" not in log.read_text()
