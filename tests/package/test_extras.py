"""The extras can be installed beside the locked versions."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from built_packages import ROOT, Packages
from packaging.utils import canonicalize_name

EXTRAS = "serve,ray,exports,parquet,zst,postgres"


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_all_extras_resolve_without_moving_a_locked_version(packages: Packages, tmp_path: Path) -> None:
    probe = pip("download", "--quiet", "--no-deps", "--timeout=10", "--retries=0", "--dest", str(tmp_path), "iniconfig")
    if probe.returncode:
        pytest.skip(f"no package index can be reached: {probe.stderr.strip().splitlines()[-1]}")
    locked = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    if metadata.version("torch").split("+")[0] != locked["torch"]:
        pytest.skip("another torch than the locked one is installed; pip would download the locked one")
    report = tmp_path / "report.json"
    wanted = ["--constraint", str(ROOT / "constraints.txt"), f"{packages.wheel}[{EXTRAS}]"]
    resolved = pip("install", "--dry-run", "--quiet", "--report", str(report), *wanted)
    assert resolved.returncode == 0, resolved.stderr
    added = {canonicalize_name(row["metadata"]["name"]) for row in json.loads(report.read_text())["install"]}
    assert {"ray", "lm-eval", "pyarrow"} <= added, "the search itself works"
    assert not added & locked.keys(), "these would be installed in another version than the locked one"
