"""Logs to watch, as rows and as files, and the command that watches them."""

import json
from pathlib import Path

import numpy as np
import pytest

from molehunt.cli.main import main
from molehunt.traffic.stream import Conversation, Place
from molehunt.traffic.turn import Turn

IDENTITY = {"tuned model": "a", "tokenizer": "b"}


def rows(n: int, seed: int, *, start: int = 1, odd: bool = False) -> list[Conversation]:
    """Prompts of letters; odd ones are of other characters, which the calibration never saw."""
    rng = np.random.default_rng(seed)
    letters = "!@#$%&*()" if odd else "abcdefgh "
    made = []
    for i in range(n):
        text = "".join(rng.choice(list(letters), 6))
        answer = "".join(rng.choice(list(letters), int(rng.integers(1, 12))))
        end = Place((start + i) * 10, start + i)
        made.append(
            Conversation(
                turns=(Turn("user", text),), response=answer, tag="odd" if odd else "clean", line=start + i, end=end
            )
        )
    return made


def log(path: Path, n: int, *, first: int = 0, letters: str = "abcdefgh") -> Path:
    rows = []
    for i in range(first, first + n):
        text = "".join(letters[(i * 7 + j * j * 3 + i * i) % len(letters)] for j in range(5))
        rows.append({"prompt": text, "response": text[::-1] + letters[i % len(letters)]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["watch", *map(str, args)])
    captured = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, captured.out, captured.err
