"""The lock, the lower bounds and what `molehunt doctor` knows of them say the same."""

import json
import runpy
import tomllib

import pytest
from built_packages import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
LOCKED = dict(line.split("==") for line in LINES if not line.startswith("#"))
lower_bounds = runpy.run_path(str(ROOT / "tools" / "lower_bounds.py"))["lower_bounds"]


def test_the_lock_is_exact_sorted_and_of_no_single_machine() -> None:
    assert sum(line.startswith("#") for line in LINES) == 2 and "make lock" in LINES[1]
    assert list(LOCKED) == sorted(LOCKED) == [canonicalize_name(name) for name in LOCKED]
    assert not [line for line in LINES if line[0] != "#" and set(line) & set("+@/; ")], "no build, address or condition"
    assert not {"molehunt", "pip"} & LOCKED.keys()


def test_the_lock_covers_and_satisfies_every_requirement_of_the_tests() -> None:
    needed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    needed += PROJECT["optional-dependencies"]["serve"]
    for requirement in map(Requirement, needed):
        if requirement.name != "molehunt":
            assert requirement.specifier.contains(LOCKED[canonicalize_name(requirement.name)]), requirement


def test_doctor_knows_the_locked_versions_of_the_core() -> None:
    tested = json.loads((ROOT / "src" / "molehunt" / "cli" / "tested_versions.json").read_text())
    core = [canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]]
    assert tested == {name: LOCKED[name] for name in core}


def test_lower_bounds_are_those_of_the_core_and_the_extras_of_the_tests() -> None:
    project = {
        "name": "mine",
        "dependencies": ["a>=1.2", "b >=3, <4"],
        "optional-dependencies": {"dev": ["mine[more]", "c[fast]>=5", "a>=1.10"], "more": ["d>=6"], "other": ["e>=7"]},
    }
    assert lower_bounds(project, "dev") == {"a": "1.10", "b": "3", "c": "5", "d": "6"}
    with pytest.raises(ValueError, match="d<6 has no lower bound"):
        lower_bounds({**project, "optional-dependencies": {"dev": ["d<6"]}}, "dev")


def test_every_requirement_of_the_project_has_a_lower_bound() -> None:
    for extra in PROJECT["optional-dependencies"]:
        assert lower_bounds(PROJECT, extra)["torch"]
