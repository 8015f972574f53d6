import subprocess
from pathlib import Path

import pytest

from molehunt.run import commit as module
from molehunt.run.commit import commit, commit_of


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *command], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "file").write_text("one")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "one")
    return folder


def test_a_clone_names_its_commit_and_says_when_files_differ_from_it(clone: Path) -> None:
    head = git(clone, "rev-parse", "HEAD")[:8]
    git(clone, "tag", "--annotate", "v1", "--message", "v1")
    assert commit_of(clone) == head, "a tag does not take its place"
    (clone / "file").write_text("two")
    assert commit_of(clone) == f"{head}-dirty"


def test_a_folder_inside_another_projects_clone_has_no_commit(clone: Path) -> None:
    (clone / "site-packages").mkdir()
    assert commit_of(clone / "site-packages") is None


def test_without_git_or_a_commit_nothing_is_claimed(clone: Path, tmp_path: Path, monkeypatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "--quiet")
    assert commit_of(empty) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(clone) is None


def test_a_package_names_the_commit_it_was_built_from(clone: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "CLONE", clone)
    monkeypatch.setattr(module, "BAKED", clone / "commit.txt")
    assert commit() == git(clone, "rev-parse", "HEAD")[:8]
    (clone / "commit.txt").write_text("0123abcd\n")
    assert commit() == "0123abcd"
