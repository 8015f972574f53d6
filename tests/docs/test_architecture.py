"""The documentation as a whole: the architecture page shows the tree, the glossary defines each term once, lines are short."""

import re
from collections import Counter
from pathlib import Path

import pytest

from doc_blocks import DOCUMENTS, ROOT, prose, title
from test_structure import ORDER

PACKAGE = ROOT / "src" / "molehunt"
DOCS = ROOT / "docs"
HAND_WRITTEN = [path for path in DOCUMENTS if path.parent != DOCS / "results" and path.name != "reference.md"]
BANNED = re.compile(r"\b(told|woken|rung|rungs|calm|loudest|brought|partings|holding)\b")
LONGEST_LINE = 159
LONGEST_SENTENCE_LINE = 120
FOLDER_ROW = re.compile(r"^\| `([\w/]+)/` \| (.+) \|$", re.MULTILINE)
ENTRY = re.compile(r"^- \*\*(.+?)\*\*: (\S.*)$", re.MULTILINE)


def folders_of_the_package() -> list[str]:
    """Every folder with source, those inside a folder behind it."""
    found: list[str] = []
    for name in ORDER:
        inner = sorted(path.parent for path in (PACKAGE / name).rglob("__init__.py"))
        found += [path.relative_to(PACKAGE).as_posix() for path in inner]
    return found


def test_the_architecture_page_names_every_folder_in_the_order_of_imports() -> None:
    rows = FOLDER_ROW.findall((DOCS / "architecture.md").read_text())
    assert [name for name, _ in rows] == folders_of_the_package()
    assert all(len(description) > 20 for _, description in rows)


def test_the_picture_shows_every_folder() -> None:
    picture = (DOCS / "architecture.md").read_text().partition("## The picture")[2].partition("## ")[0]
    assert [name for name in ORDER if f"{name}/" not in picture] == []


def test_the_glossary_defines_each_term_once() -> None:
    text = (DOCS / "glossary.md").read_text()
    entries = ENTRY.findall(text)
    assert text.count("\n- ") == len(entries), "an entry is a term in bold, a colon and a definition"
    terms = Counter(term.casefold() for term, _ in entries)
    assert [term for term, count in terms.items() if count > 1] == []
    assert len(terms) > 100


def test_the_glossary_has_every_term_that_the_concepts_introduce() -> None:
    terms = {term.casefold() for term, _ in ENTRY.findall((DOCS / "glossary.md").read_text())}
    introduced = {
        term.casefold().rstrip(".,:;") for term in re.findall(r"\*\*(.+?)\*\*", (DOCS / "concepts.md").read_text())
    }
    missing = {term for term in introduced if not {term, term.removesuffix("s"), term.removesuffix("es")} & terms}
    assert not missing


def test_the_index_and_the_results_lead_to_every_page() -> None:
    index, results = (DOCS / "index.md").read_text(), (DOCS / "results" / "README.md").read_text()
    pages = {path.relative_to(DOCS).as_posix() for path in [*DOCS.glob("*.md"), *DOCS.glob("guides/*.md")]}
    assert {page for page in pages - {"index.md"} if f"({page})" not in index} == set()
    tables = {path.name for path in DOCS.glob("results/*.md")} - {"README.md"}
    assert {page for page in tables if f"({page})" not in results} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=title)
def test_lines_are_short_and_words_are_plain(document: Path) -> None:
    for number, line in enumerate(document.read_text().splitlines(), 1):
        assert line.startswith("![") or len(line) <= LONGEST_LINE, (
            f"{title(document)}:{number} has {len(line)} characters"
        )
        assert not BANNED.search(line), f"{title(document)}:{number} {line}"


@pytest.mark.parametrize("document", HAND_WRITTEN, ids=title)
def test_sentences_are_wrapped(document: Path) -> None:
    for number, line in enumerate(prose(document).splitlines(), 1):
        table_or_image = line.startswith(("|", "!["))
        assert table_or_image or len(line) <= LONGEST_SENTENCE_LINE, f"{title(document)}:{number} {line}"


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
