"""What the documents hold: fenced blocks with their markers, code spans with the section they stand in, and prose."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"sh": "commands, which run", "python": "code, which runs", "text": "output, which is only shown"}
NEEDS = {
    "hub": "downloads a model, a dictionary or prompts from a model hub",
    "vllm": "needs vLLM, which no extra installs",
    "peers": "needs other environments with the libraries that are compared",
}
"""Reasons for which a block may stay unrun: `<!-- needs: hub -->` on the line above its fence."""
FENCE = re.compile(
    r"^(?:<!-- needs: (?P<needs>[\w, -]+) -->\n)?```(?P<language>\S*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    document: str
    line: int
    language: str
    needs: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command, without what stands behind a `#`."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


@dataclass(frozen=True)
class Span:
    """Code inside a sentence, and the section that it stands in, with its blocks."""

    document: str
    line: int
    text: str
    section: str

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line} {self.text}"


def title(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def blocks(document: Path) -> list[Block]:
    text = document.read_text()
    return [
        Block(
            document=title(document),
            line=text[: found.start("language")].count("\n") + 1,
            language=found["language"],
            needs=tuple(part.strip() for part in (found["needs"] or "").split(",") if part.strip()),
            text=found["text"],
        )
        for found in FENCE.finditer(text)
    ]


def prose(document: Path) -> str:
    """The document with its blocks blanked, line by line as it was."""
    return FENCE.sub(lambda found: "\n" * found[0].count("\n"), document.read_text())


def spans(document: Path) -> Iterator[Span]:
    plain, whole = prose(document).splitlines(), document.read_text().splitlines()
    starts = [i for i, line in enumerate(plain) if i == 0 or line.startswith("#")]
    for start, end in zip(starts, [*starts[1:], len(plain)], strict=True):
        section = "\n".join(whole[start:end])
        for i in range(start, end):
            for found in re.findall(r"`([^`]+)`", plain[i]):
                yield Span(title(document), i + 1, found, section)


def every_block(*languages: str) -> list[Block]:
    return [block for document in DOCUMENTS for block in blocks(document) if block.language in languages]
