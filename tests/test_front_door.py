"""What `import molehunt as mh` offers: few names, each with an example, and nothing heavy until one is used."""

import doctest
import inspect
import subprocess
import sys
import types

import pytest
import torch

import molehunt as mh

MOST_NAMES = 25
HEAVY = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "safetensors",
    "scipy",
    "numpy",
    "jinja2",
    "sqlalchemy",
    "typer",
)
VERBS = ("audit", "bench", "plant", "steer", "stress", "transfer", "watch")


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_the_names_are_few_and_listed() -> None:
    assert len(mh.__all__) <= MOST_NAMES
    assert mh.__all__ == sorted(mh.__all__) and set(mh.__all__) == set(mh._HOMES)
    assert {name for name in dir(mh) if not (name.startswith("__") and name.endswith("__"))} == set(mh.__all__)
    assert {"__all__", "__doc__", "__version__"} <= set(dir(mh))
    assert {"ModelPair", "SteeringVector", "Site", "edit_sites", "read_sites", *VERBS} <= set(mh.__all__)


@pytest.mark.parametrize("name", mh.__all__)
def test_every_name_is_there_and_is_documented_with_an_example(name: str) -> None:
    found = getattr(mh, name)
    assert not isinstance(found, types.ModuleType)
    text = inspect.getdoc(found) or ""
    assert text, f"{name} has no docstring"
    _, separator, example = text.partition("\nExample:\n")
    assert separator and ">>> " in example, f"the docstring of {name} has no example"


@pytest.mark.parametrize("name", mh.__all__)
def test_an_example_that_needs_no_models_runs(name: str) -> None:
    found = getattr(mh, name)
    module = sys.modules[found.__module__]
    names = {"mh": mh, "torch": torch, "Site": mh.Site, "Direction": mh.Direction, **vars(module)}
    for test in doctest.DocTestFinder(recurse=False).find(found, name, module=False, globs=names):
        assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_shows_progress_and_takes_options_by_name_only(name: str) -> None:
    parameters = inspect.signature(getattr(mh, name)).parameters
    assert "track" in parameters
    by_place = [one for one in parameters.values() if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert 1 <= len(by_place) <= 2, "the models, or what is planted where; everything else has a name"


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert fresh(f"import sys, molehunt; dir(molehunt); print([m for m in {HEAVY} if m in sys.modules])") == "[]"
    assert fresh(f"import sys; from molehunt import Site; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


@pytest.mark.parametrize(
    "first", ["molehunt.audit.run", "molehunt.watch.log", "molehunt.steer.vector", "molehunt.bench.run"]
)
def test_a_verb_stays_a_function_when_the_folder_of_its_name_is_imported(first: str) -> None:
    verb = first.split(".")[1]
    code = f"""
import {first}
import molehunt as mh
from {first} import __doc__ as deep
assert callable(mh.{verb}) and mh.{verb}.__module__ == "molehunt.workflows.{verb}", mh.{verb}
import {first}
from molehunt import {verb}
assert {verb} is mh.{verb} and deep
print("function")
"""
    assert fresh(code) == "function"


def test_deep_imports_work_after_a_verb_was_used() -> None:
    code = """
import molehunt as mh
verb = mh.audit
from molehunt.audit.run import run_audit
from molehunt.watch import log
assert mh.audit is verb and callable(run_audit) and log.__name__ == "molehunt.watch.log"
print("both")
"""
    assert fresh(code) == "both"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'molehunt' has no attribute 'nonsense'"):
        _ = mh.nonsense
    assert not hasattr(mh, "Nothing")
    with pytest.raises(ImportError):
        from molehunt import nonsense  # noqa: F401
