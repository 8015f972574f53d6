"""Dockerfiles as lists of instructions; only the forms that the project's own file uses."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction: `word` is FROM, RUN and so on, `rest` is what follows it, on one line."""

    word: str
    rest: str


def instructions(path: Path) -> list[Instruction]:
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


def stages(found: list[Instruction]) -> list[list[Instruction]]:
    """The instructions of each stage; each begins with its FROM."""
    parts: list[list[Instruction]] = []
    for instruction in found:
        if instruction.word == "FROM":
            parts.append([])
        parts[-1].append(instruction)
    return parts
