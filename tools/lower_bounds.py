"""Print the oldest release that pyproject.toml allows of each library, as pins for `make test-oldest`.

The core, the extra `dev` and the extras that it includes are covered: what the tests need.
"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lower_bounds(project: dict[str, dict[str, list[str]]], extra: str) -> dict[str, str]:
    """Library → the version after `>=`, for the core of `project` and one of its extras.

    Where a library is named twice, as in two extras, the higher bound counts: pip would choose it, too.

    Raises:
        ValueError: a requirement has no lower bound, so nobody can say what it was tested with.
    """
    bounds: dict[str, str] = {}
    waiting = [*project["dependencies"], *project["optional-dependencies"][extra]]
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name == project["name"]:  # `molehunt[serve]`: the extra of the same name is meant
            waiting += [line for own in requirement.extras for line in project["optional-dependencies"][own]]
            continue
        lower = [part.version for part in requirement.specifier if part.operator == ">="]
        if not lower:
            raise ValueError(f"{requirement} has no lower bound")
        known = bounds.get(requirement.name, lower[0])
        bounds[requirement.name] = max(known, lower[0], key=Version)
    return dict(sorted(bounds.items()))


if __name__ == "__main__":
    found = lower_bounds(tomllib.loads(PYPROJECT.read_text())["project"], "dev")
    print("".join(f"{name}=={version}\n" for name, version in found.items()), end="")
