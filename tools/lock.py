"""Write the versions of this environment as the ones to test with: `make lock` runs it in a fresh environment.

constraints.txt pins all of it, for clones. tested_versions.json in the package repeats the core, for `molehunt doctor`.
"""

import json
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
HEADER = """\
# The exact versions that Molehunt is tested with: `pip install -c constraints.txt …` takes these.
# Made by `make lock` from the newest releases on a CPU build of torch; do not edit.
"""
LEFT_OUT = ("molehunt", "pip")
BUILD_OF_TORCH = ("nvidia-", "cuda-", "triton")
"""Libraries that only some builds of torch need; each build names their versions itself."""


def installed() -> dict[str, str]:
    """Library → version, without the local part that distinguishes builds of one version (`+cpu`)."""
    found = {canonicalize_name(part.name): Version(part.version).public for part in metadata.distributions()}
    return {
        name: version
        for name, version in sorted(found.items())
        if name not in LEFT_OUT and not name.startswith(BUILD_OF_TORCH)
    }


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = installed()
    core = [canonicalize_name(Requirement(line).name) for line in project["dependencies"]]
    pins = "".join(f"{name}=={version}\n" for name, version in versions.items())
    (ROOT / "constraints.txt").write_text(HEADER + pins)
    tested = json.dumps({name: versions[name] for name in core}, indent=2)
    (ROOT / "src" / "molehunt" / "cli" / "tested_versions.json").write_text(tested + "\n")


if __name__ == "__main__":
    main()
