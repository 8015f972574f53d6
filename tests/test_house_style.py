"""The size of files and functions, and the words that the project uses."""

import ast
import re
from collections import defaultdict
from itertools import chain
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "molehunt"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.read_text().strip())
LONGEST_FILE, MEDIAN_FILE, SHORTEST_FILE = 400, 150, 25
LONG_FUNCTION, LONG_FUNCTIONS, LONGEST_FUNCTION = 60, 10, 100
LONGEST_LINE_OF_DOCS = 160
BANNED = re.compile(r"\b([Tt]old|[Ww]oken|[Rr]ungs?|[Cc]alm|[Ll]oudest|[Bb]rought|[Pp]artings|[Hh]olding)\b")
"""Words that stood for terms of the field, or that a reader has to decode. What to write: docs/glossary.md."""
SHORT: dict[str, str] = {
    "checkpoint/difference.py": "the row that every comparison of folders yields",
    "cli/renamed_options.py": "a table of old names, and its look-up",
    "detect/reads.py": "the choice of activations that several detectors share",
    "run/counting.py": "numbers with their nouns, for the messages of every layer",
    "run/extras.py": "how an extra is installed, for the messages of every layer",
    "traffic/example.py": "the class that every file of the folder shares",
}
"""Short files that are no catalogue and no recipe, each with its reason."""


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def is_recipe(path: Path) -> bool:
    """An organism's recipe: one file each, however little it says."""
    return (
        path.parent.name == "organism"
        and f'"molehunt.organism.{path.stem}:' in (path.parent / "catalog.py").read_text()
    )


def test_files_are_of_a_length_that_can_be_read_at_once() -> None:
    lengths = {name(path): len(lines(path)) for path in SOURCES}
    assert {file: length for file, length in lengths.items() if length > LONGEST_FILE} == {}
    assert median(length for file, length in lengths.items() if not file.endswith("__init__.py")) <= MEDIAN_FILE


def test_a_short_file_has_a_reason() -> None:
    short = {
        name(path)
        for path in SOURCES
        if len(lines(path)) < SHORTEST_FILE
        and path.name not in {"__init__.py", "__main__.py", "catalog.py"}
        and not is_recipe(path)
    }
    assert short <= set(SHORT)
    assert all((PACKAGE / file).is_file() and reason for file, reason in SHORT.items())


def test_functions_are_short() -> None:
    lengths = {
        f"{name(path)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = {where: length for where, length in lengths.items() if length > LONG_FUNCTION}
    assert {where: length for where, length in long.items() if length > LONGEST_FUNCTION} == {}
    assert not {where: length for where, length in long.items() if where.startswith("cli/")}
    assert len(long) <= LONG_FUNCTIONS, long


def test_two_things_never_share_a_class_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{name(path)}:{node.lineno}")
    assert {one: where for one, where in places.items() if len(where) > 1} == {}


def written() -> list[Path]:
    """What a reader of the source and the documentation reads."""
    kinds = {".py", ".md", ".html", ".css", ".yaml", ".yml", ".toml", ".j2", ".txt", ".js"}
    under = chain((ROOT / "src").rglob("*"), (ROOT / "docs").rglob("*"))
    return [
        *(path for path in sorted(under) if path.suffix in kinds and ".egg-info" not in path.as_posix()),
        ROOT / "README.md",
    ]


def test_words_are_those_of_the_field() -> None:
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{number}: {word.group()}"
        for path in written()
        for number, line in enumerate(lines(path), 1)
        for word in BANNED.finditer(line)
    ]
    assert not found, "\n".join(found)


def test_lines_of_documentation_are_short() -> None:
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{number}"
        for path in (*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md")
        for number, line in enumerate(lines(path), 1)
        if len(line) >= LONGEST_LINE_OF_DOCS
    ]
    assert not found, "\n".join(found)


def test_a_docstring_stands_alone() -> None:
    """No docstring goes on with a sentence that stands elsewhere, as "Of each attack." would."""
    found = [
        f"{name(path)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if re.match(r"(Of|With) (?!.*: )", node.value.value)
    ]
    assert not found, "\n".join(found)
