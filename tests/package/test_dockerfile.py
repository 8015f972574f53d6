"""The Dockerfile follows good practice, and its commands work; no engine is needed for either."""

import json
import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from built_packages import ROOT, Packages, git
from dockerfile import Instruction, instructions, stages
from environments import fresh_environment

DOCKERFILE = ROOT / "Dockerfile"
FOUND = instructions(DOCKERFILE)
RUNS = [instruction.rest for instruction in FOUND if instruction.word == "RUN"]


def every(word: str) -> list[str]:
    return [instruction.rest for instruction in FOUND if instruction.word == word]


def copied(instruction: Instruction) -> tuple[str | None, list[str], str]:
    """The stage that COPY takes from, if any, its sources and its target."""
    stage, *words = re.sub(r"^(--from=(\S+) )?", r"\2 ", instruction.rest).split(" ")
    return stage or None, words[:-1], words[-1]


def test_every_base_image_is_pinned_to_a_version_and_a_debian_release() -> None:
    assert len(every("FROM")) == 2
    assert all(re.fullmatch(r"python:3\.\d+-slim-\w+( AS \w+)?", base) for base in every("FROM"))
    assert len({base.split()[0] for base in every("FROM")}) == 1, "the wheel is built where it is installed"


def test_it_runs_as_an_ordinary_user_with_a_command_in_exec_form() -> None:
    last = stages(FOUND)[-1]
    users = [instruction.rest for instruction in last if instruction.word == "USER"]
    assert users and re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]), (
        "a number, so that an engine can see it is not root"
    )
    after = [instruction.word for instruction in last][[i.word for i in last].index("USER") :]
    assert not {"RUN", "COPY"} & set(after)
    assert json.loads(every("ENTRYPOINT")[-1]) == ["molehunt"]
    assert all(isinstance(json.loads(command), list) for command in every("CMD"))


def test_nothing_is_fetched_but_by_pip_and_no_cache_stays() -> None:
    assert not every("ADD"), "COPY takes files of the clone; ADD would take addresses, too"
    for command in RUNS:
        assert not re.search(r"\b(curl|wget|sudo)\b|https?://", command)
        assert command.count("pip install") + command.count("pip wheel") == command.count("--no-cache-dir")
        if "apt-get install" in command:
            assert "--no-install-recommends" in command and "rm -rf /var/lib/apt/lists/*" in command
    assert not re.search(r"https?://", DOCKERFILE.read_text())


def test_every_installation_is_held_to_the_lock() -> None:
    for command in RUNS:
        for part in command.split("&&"):
            assert "pip install" not in part or "--constraint constraints.txt" in part
            assert "pip wheel" not in part or {"--no-deps", "--no-build-isolation"} <= set(part.split())


def test_only_tracked_files_are_copied_and_they_reach_the_engine(packages: Packages) -> None:
    tracked = git(packages.clone, "ls-files").splitlines()
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert sent[0] == "*"
    names = [
        name for i in FOUND if i.word == "COPY" for stage, names, _ in [copied(i)] if stage is None for name in names
    ]
    assert names
    for name in names:
        assert any(file == name or file.startswith(f"{name}/") for file in tracked), name
        assert f"!{name}" in sent, name


@pytest.mark.slow
def test_its_commands_run_as_a_script_and_leave_a_working_command(packages: Packages, tmp_path: Path) -> None:
    """Each stage is a folder and an environment here. The libraries, torch among them, are this environment's:
    pip checks that they satisfy the lock, and downloads nothing."""
    locked = (ROOT / "constraints.txt").read_text()
    if f"torch=={metadata.version('torch').split('+')[0]}\n" not in locked:
        pytest.skip("this environment does not have the locked versions")
    roots: dict[str, Path] = {}
    arguments = {"COMMIT": "0123abcd"}
    for i, stage in enumerate(stages(FOUND)):
        root = roots[stage[0].rest.partition(" AS ")[2]] = tmp_path / f"stage{i}"
        python = fresh_environment(tmp_path / f"environment{i}", with_pip=True)
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV", "PIP"))}
        variables |= {
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
        }
        here = root
        for instruction in stage[1:]:
            match instruction.word:
                case "WORKDIR":
                    here = root / instruction.rest.lstrip("/")
                    here.mkdir(parents=True, exist_ok=True)
                case "COPY":
                    source, names, target = copied(instruction)
                    for name in names:
                        path = roots[source] / name.lstrip("/") if source else packages.clone / name
                        into = here / target / (path.name if target.endswith("/") else "")
                        shutil.copytree(path, into) if path.is_dir() else shutil.copy(path, into)
                case "ARG":
                    name, _, default = instruction.rest.partition("=")
                    variables[name] = arguments.get(name, default.strip('"'))
                case "ENV":
                    name, _, value = instruction.rest.partition("=")
                    variables[name] = str(root / value.lstrip("/"))
                case "RUN":
                    # Files can be given to another user by root alone, and the tests may run as anybody.
                    command = instruction.rest.replace("1000:1000", f"{os.getuid()}:{os.getgid()}")
                    ran = subprocess.run(
                        ["sh", "-euc", command], cwd=here, env=variables, capture_output=True, text=True
                    )
                    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
                case _:
                    assert instruction.word in {"USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    entry = json.loads(every("ENTRYPOINT")[-1])

    def started(*command: str) -> str:
        done = subprocess.run([*entry, *command], cwd=here, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "Usage: molehunt" in started(*json.loads(every("CMD")[-1]))
    assert "(commit 0123abcd)" in started("--version")
    assert json.loads(started("doctor", "--json"))["extras"]["serve"] == "present"
