import pytest

from planted_organism import Planted, planted_organism


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return planted_organism(tmp_path_factory.mktemp("planted"))
