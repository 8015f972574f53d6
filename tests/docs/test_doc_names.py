"""What the documents name is there: commands, options, targets, extras, modules, files, links and verdicts."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from command_line import PROGRAMS, check, command_of, options, parsed, script_options
from doc_blocks import DOCUMENTS, LANGUAGES, NEEDS, ROOT, Block, Span, blocks, every_block, prose, spans, title
from documented_folder import WRITTEN
from molehunt.audit.verdict import Verdict
from molehunt.cli.main import COMMANDS

PACKAGE = ROOT / "src" / "molehunt"
EXPERIMENTS = ROOT / "experiments"
WRITTEN_FILES = {file for files in WRITTEN.values() for file in files} | {"clean.jsonl", "triggered.jsonl"}
"""What commands write into the folder of `--out`, and what the tutorial writes."""
SOURCES = "\n".join(path.read_text() for root in ("src", "experiments") for path in sorted((ROOT / root).rglob("*.py")))
FORMER = {"prompts.show_it"}
"""Names in files of earlier versions."""
THEIRS = {"vllm", "openai", "output_hidden_states", "AsyncLLM", "finish_reason"}
"""Names of other libraries."""
FILE = re.compile(r"[\w.*-]*(/[\w.*-]+)*/?(?<=/|.)(\.(py|md|jsonl?|yaml|html|sqlite|safetensors|txt)|/)")
DOTTED = re.compile(r"molehunt(\.\w+)+")
IDENTIFIER = re.compile(r"[A-Za-z]\w*(\.\w+)*")

SPANS = [span for document in DOCUMENTS for span in spans(document)]


def resolve(dotted: str) -> object:
    """The module, class, function or method of this name. Raises where there is none."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        owner, _, attribute = dotted.rpartition(".")
        return getattr(resolve(owner), attribute)


def commands_in(text: str) -> set[str]:
    """Commands of `molehunt` and scripts of this project that a text names."""
    return {
        name for name in re.findall(r"(?:molehunt |python )([\w/.-]+)", text) if name in COMMANDS or name[-3:] == ".py"
    }


def options_near(span: Span) -> set[str]:
    """Options of the commands that the span's section names, or its document where that names none, or of all."""
    known = commands_in(span.section) or commands_in((ROOT / span.document).read_text()) or set(COMMANDS)
    return set[str]().union(
        *(script_options(name) if name.endswith(".py") else options(command_of([name])[0]) for name in known)
    )


def named_spans(kind: str) -> list[Span]:
    tests = {
        "command": lambda text: " " in text and text.split()[0].removeprefix(".venv/bin/") in PROGRAMS,
        "option": lambda text: text.startswith("--"),
        "file": lambda text: FILE.fullmatch(text) is not None,
        "dotted": lambda text: DOTTED.fullmatch(text) is not None,
        "name": lambda text: (
            IDENTIFIER.fullmatch(text) is not None
            and not DOTTED.fullmatch(text)
            and not FILE.fullmatch(text)
            and ("_" in text or re.search(r"[a-z][A-Z]", text) is not None)
        ),
    }
    return [span for span in SPANS if tests[kind](span.text)]


def by_document(kind: str) -> list[tuple[str, list[Span]]]:
    """The spans of one kind, a document at a time."""
    found: dict[str, list[Span]] = {}
    for span in named_spans(kind):
        found.setdefault(span.document, []).append(span)
    return list(found.items())


def each(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("named", [pytest.param(some, id=name) for name, some in by_document(kind)])


@pytest.mark.parametrize("document", DOCUMENTS, ids=title)
def test_every_block_is_of_a_known_kind(document: Path) -> None:
    found = blocks(document)
    fences = [line for line in document.read_text().splitlines() if line.startswith("```")]
    assert len(fences) == 2 * len(found), "a fence is not closed, or its marker is misspelt"
    assert not re.search("^<!--", prose(document), re.MULTILINE), "a marker stands on the line above its block"
    for block in found:
        assert block.language in LANGUAGES, f"{block.name}: a block is one of {', '.join(LANGUAGES)}"
        assert set(block.needs) <= NEEDS.keys(), f"{block.name}: nobody knows the need {block.needs}"


@pytest.mark.parametrize("block", every_block("sh"), ids=lambda block: block.name)
def test_every_command_has_its_options_and_arguments(block: Block) -> None:
    assert block.commands
    for words in block.commands:
        check(words)
        if words[0] == "molehunt":
            parsed(words[1:])


@pytest.mark.parametrize("block", every_block("python"), ids=lambda block: block.name)
def test_every_import_and_dotted_name_of_a_snippet_is_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "molehunt":
            for alias in node.names:
                resolve(f"{node.module}.{alias.name}")
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name in THEIRS or resolve(alias.name)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            resolve(node.value)


@each("command")
def test_commands_in_sentences_are_there(named: list[Span]) -> None:
    for span in named:
        installs = span.text.startswith("pip ")
        check(shlex.split(span.text) if installs else re.sub(r"[|…\[\]]|'[^']*'", " ", span.text).split())


@each("option")
def test_options_in_sentences_are_there(named: list[Span]) -> None:
    for span in named:
        used = {word for word in span.text.split() if word.startswith("--")}
        assert used <= options_near(span), f"{span.name}: no command of this section has {used - options_near(span)}"


@each("dotted")
def test_modules_in_sentences_are_importable(named: list[Span]) -> None:
    for span in named:
        resolve(span.text)


@each("name")
def test_names_in_sentences_occur_in_the_source(named: list[Span]) -> None:
    for span in named:
        last = span.text.rpartition(".")[2]
        assert span.text in THEIRS | FORMER or re.search(rf"\b{re.escape(last)}\b", SOURCES), span.name


@each("file")
def test_files_in_sentences_are_there_or_written_by_the_product(named: list[Span]) -> None:
    for span in named:
        here = any(any(root.glob(span.text)) for root in (ROOT, PACKAGE)) or any(EXPERIMENTS.rglob(span.text))
        written = Path(span.text).name in SOURCES or span.text in WRITTEN_FILES or span.text.startswith("demo/")
        assert here or written, span.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=title)
def test_every_link_leads_to_a_file(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target.partition("#")[0]).exists(), target


def test_the_table_of_verdicts_is_the_products() -> None:
    rows = re.findall(r"^\| ([A-Z -]+) \| (\d) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name: int(code) for name, code in rows} == {str(one): one.exit_code for one in Verdict}


def test_the_readme_shows_every_command_and_every_guide() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"molehunt {name}" in text or f"make {name}" in text for name in COMMANDS)
    assert all(f"(docs/guides/{path.name})" in text for path in (ROOT / "docs" / "guides").glob("*.md"))
    assert "make demo" in text[:1000] and "make test" in text[:1000]
