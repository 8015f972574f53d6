"""docs/reference.md is what tools/reference.py writes from the source of today."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import molehunt
from doc_blocks import ROOT
from molehunt.cli.main import COMMANDS


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date(reference: ModuleType) -> None:
    assert reference.PAGE.read_text() == reference.page(), "run python tools/reference.py"


def test_it_has_every_public_name_and_every_command(reference: ModuleType) -> None:
    text = reference.PAGE.read_text()
    assert [name for name in molehunt.__all__ if f"### `{name}`\n" not in text] == []
    assert [name for name in COMMANDS if f"### `molehunt {name}" not in text] == []


def test_every_public_name_has_a_docstring_with_an_example(reference: ModuleType) -> None:
    documented = {name: ast.get_docstring(reference.definition(name)) or "" for name in molehunt.__all__}
    assert [name for name, text in documented.items() if "Example:\n" not in text] == []


def test_a_page_out_of_date_is_named(reference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PAGE", tmp_path / "reference.md")
    monkeypatch.setattr(sys, "argv", ["reference.py"])
    reference.main()
    monkeypatch.setattr(sys, "argv", ["reference.py", "--check"])
    reference.main()
    reference.PAGE.write_text(reference.PAGE.read_text().replace("Reference", "Old reference", 1))
    with pytest.raises(SystemExit, match="out of date"):
        reference.main()


def test_a_function_is_shown_with_arguments_errors_and_example(reference: ModuleType) -> None:
    node = ast.parse('''
def scale(x: float, *, by: "float | None" = None, **more: int) -> "Scaled":
    """Multiply a number.

    Args:
        x: the number
            that is multiplied.
        by: the factor.

    Raises:
        ValueError: nothing fits.

    Example:
        >>> scale(2)  # doctest: +SKIP
    """
''').body[0]
    assert reference.function_entry("scale", node).splitlines() == [
        "### `scale`", "", "```text", "scale(x: float, *, by: 'float | None' = None, **more: int) -> Scaled", "```", "",
        "Multiply a number.", "", "Arguments:", "", "- `x`: the number that is multiplied.", "- `by`: the factor.", "",
        "Raises:", "", "- `ValueError`: nothing fits.", "", "```text", ">>> scale(2)", "```", "",
    ]  # fmt: skip


def test_methods_that_are_private_are_left_out_and_fields_keep_their_words(reference: ModuleType) -> None:
    node = ast.parse('''
class Box:
    """A box."""

    size: int
    """Its
    size."""
    _hidden: int

    def open(self, wide: bool = True) -> None:
        """Open it."""

    @property
    def name(self) -> str:
        """What it is called."""

    def _close(self) -> None: ...
''').body[0]
    text = reference.class_entry("Box", node)
    assert "- `size: int`: Its size.\n" in text and "_hidden" not in text and "_close" not in text
    assert "```text\nopen(wide: bool = True) -> None\n```" in text and "```text\nname: str\n```" in text
