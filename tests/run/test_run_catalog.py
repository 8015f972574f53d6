import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import PurePosixPath

import pytest

from molehunt.errors import UsageError
from molehunt.run import catalog
from molehunt.run.catalog import load, names

CATALOG = {"posix-path": "pathlib:PurePosixPath", "broken": "molehunt.no_such_module:X"}
GROUP = "molehunt.tests"


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = EntryPoints(
        [
            EntryPoint("abacus", "collections:Counter", GROUP),
            EntryPoint("posix-path", "collections:Counter", GROUP),
            EntryPoint("elsewhere", "collections:Counter", "molehunt.other"),
        ]
    )
    monkeypatch.setattr(catalog, "entry_points", lambda group: installed.select(group=group))


def test_a_row_leads_to_its_class() -> None:
    assert load(CATALOG, "posix-path", GROUP) is PurePosixPath


def test_names_import_nothing() -> None:
    assert names(CATALOG, GROUP) == ("broken", "posix-path")
    assert "molehunt.no_such_module" not in sys.modules


def test_an_unknown_name_lists_what_exists_and_guesses() -> None:
    with pytest.raises(UsageError, match=r"Did you mean posix-path\?\nAvailable: broken, posix-path\.") as caught:
        load(CATALOG, "posixpath", GROUP)
    assert "'posixpath'" in str(caught.value)
    with pytest.raises(UsageError, match=r"here\.\nAvailable: nothing\."):
        load({}, "x\x1b[31m", GROUP)


def test_a_row_that_cannot_be_imported_is_our_fault() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load(CATALOG, "broken", GROUP)


@pytest.mark.usefixtures("plugins")
def test_plugins_of_the_group_join_the_table() -> None:
    from collections import Counter

    assert names(CATALOG, GROUP) == ("abacus", "broken", "posix-path")
    assert load(CATALOG, "abacus", GROUP) is Counter
    with pytest.raises(UsageError, match="There is no 'elsewhere'"):
        load(CATALOG, "elsewhere", GROUP)


@pytest.mark.usefixtures("plugins")
def test_a_name_offered_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="by the plugin collections:Counter"):
        load(CATALOG, "posix-path", GROUP)
