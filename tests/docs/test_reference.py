"""docs/reference.md is what tools/reference.py writes from the source of today."""

import ast
import importlib
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


def test_it_has_what_each_verb_returns(reference: ModuleType) -> None:
    verbs = [node for node in map(reference.definition, molehunt.__all__) if isinstance(node, ast.FunctionDef)]
    returned = {ast.unparse(node.returns) for node in verbs if node.returns is not None}
    results = {name for name in returned if name.endswith(("Result", "Detector"))}
    assert len(results) == 8
    text = reference.PAGE.read_text()
    assert [name for name in results if f"### `{name}`\n" not in text] == []


@pytest.mark.parametrize("section", ["Results", "Options", "For authors of detectors"])
def test_its_further_classes_are_importable_from_where_it_says(reference: ModuleType, section: str) -> None:
    text = reference.PAGE.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    homes, _ = reference.SECTIONS[section]
    for name, home in homes.items():
        entry = text.partition(f"### `{name}`\n")[2].partition("\n### ")[0]
        assert f"Import it from `{home}`." in entry
        assert isinstance(getattr(importlib.import_module(home), name), type)
        assert "\n- `" in entry or "\n#### `" in entry, f"{name} has neither a field nor a method"


def test_a_class_that_extends_another_says_so(reference: ModuleType) -> None:
    node = ast.parse("class AnswerVerdict(RowVerdict):\n    threshold: float").body[0]
    text = reference.class_entry("AnswerVerdict", node, "here")
    assert "Import it from `here`. It also has everything that `RowVerdict` has.\n\n- `threshold: float`" in text


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

    lid: bool = True
    made: list[int] = field(default_factory=list)
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
    assert "- `lid: bool = True`\n" in text and "- `made: list[int]`\n" in text, (
        "a default that a call makes is left out"
    )
    assert "- `size: int`: Its size.\n" in text and "_hidden" not in text and "_close" not in text
    assert "```text\nopen(wide: bool = True) -> None\n```" in text and "```text\nname: str\n```" in text
