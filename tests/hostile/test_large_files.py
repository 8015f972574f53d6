"""A settings or tokenizer file far larger than any real one is refused by name before anybody reads it."""

import os
import time
from pathlib import Path

import pytest

from folders import good_folder
from molehunt.checkpoint.loader_traps import MAX_TEXT
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "extra/chat_template.jinja", "spiece.model"])
def test_a_huge_file_is_refused_without_being_read(name: str, tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "m")
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("wb") as file:
        os.truncate(file.fileno(), MAX_TEXT + 1)  # a hole: it takes no disk
    began = time.monotonic()
    with pytest.raises(InvalidInput, match=f"{name} is larger than 256 MB"):
        Checkpoint.open(folder)
    assert time.monotonic() - began < 2
    os.truncate(folder / name, 0)
    assert Checkpoint.open(folder).names()
