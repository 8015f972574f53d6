"""The forge's workflow runs .ci/run on every Python that the metadata promises."""

import re
import tomllib

import yaml
from built_packages import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
(JOB,) = WORKFLOW["jobs"].values()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_the_tested_pythons_are_those_that_the_metadata_names() -> None:
    tested = JOB["strategy"]["matrix"]["python"]
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: \d+\.\d+$", line)]
    assert tested == named == sorted(tested, key=number)
    assert PROJECT["requires-python"] == f">={tested[0]}", "the oldest that may be used is tested"
    assert all(isinstance(version, str) for version in tested), "3.10 without quotes is 3.1"


def test_it_runs_what_continuous_integration_runs_on_that_python() -> None:
    assert [step["run"] for step in JOB["steps"] if ".ci/run" in step.get("run", "")] == ["bash .ci/run"]
    assert JOB["env"]["PYTHON"] == "python${{ matrix.python }}"
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()
    makefile = (ROOT / "Makefile").read_text()
    assert makefile.count("PYTHON ?= python3") == 1, "the environment's PYTHON is taken"
    assert not re.search(r"^\t(python3?|pip) ", makefile, re.MULTILINE)


def test_actions_are_pinned_and_may_only_read() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"} and "permissions" not in JOB
    used = [step["uses"] for step in JOB["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in used)
    assert set(WORKFLOW[True]) == {"push", "pull_request"}  # YAML reads `on` as true
    assert not JOB["runs-on"].endswith("latest") and JOB["timeout-minutes"] <= 120
