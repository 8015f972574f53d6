from pathlib import Path

import pytest
from built_packages import ROOT, Packages, build_packages
from environments import fresh_environment, install


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so nobody knows which files belong to it")
    return build_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def installed(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `molehunt` command of an environment outside the clone into which the wheel was installed."""
    python = fresh_environment(tmp_path_factory.mktemp("installed") / "environment")
    install(python, str(packages.wheel))
    return python.with_name("molehunt")
