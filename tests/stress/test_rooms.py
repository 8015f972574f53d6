"""The folders of `stress` import in the order that its docstring names, each from those before it."""

import ast
from pathlib import Path

import pytest

import molehunt

ROOT = Path(molehunt.__file__).parent / "stress"
ORDER = ("attacks", "defences", "evaluation", "")
FILES = sorted(ROOT.rglob("*.py"))


def room(parts: tuple[str, ...]) -> str:
    """The folder of a module of `stress`, empty for a module at the top."""
    return parts[0] if parts and parts[0] in ORDER else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_folder_imports_from_a_later_one(path: Path) -> None:
    own = ORDER.index(room(path.relative_to(ROOT).parts[:-1]))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("molehunt.stress"):
            other = room(tuple((node.module or "").split(".")[2:]))
            assert ORDER.index(other) <= own, f"{path.relative_to(ROOT)} imports {node.module}"


def test_the_docstring_names_the_order() -> None:
    text = (ROOT / "__init__.py").read_text()
    places = [text.index(f"`{folder}`") for folder in ORDER if folder]
    assert places == sorted(places)
    assert {path.parent.name for path in FILES} == {*ORDER[:-1], "stress"}
