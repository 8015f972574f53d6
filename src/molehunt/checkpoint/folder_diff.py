"""Differences between two folders besides their weights: a backdoor needs no weight change.

Configuration, generation settings, tokenizer and chat template are compared by meaning. Templates are also rendered on
fixed conversations on both sides, because the model sees only the rendered text.
"""

from pathlib import Path

from molehunt.checkpoint.difference import FolderDifference
from molehunt.checkpoint.settings_diff import SETTINGS, setting_differences, settings_of
from molehunt.checkpoint.template_diff import template_differences
from molehunt.checkpoint.tokenizer_diff import slow_tokenizer_differences, tokenizer_differences


def folder_differences(base: Path, tuned: Path) -> list[FolderDifference]:
    """Every difference in meaning between two folders, findings first.

    A file that an adapter folder lacks is no difference, because loaders take the file of the base.

    Raises:
        InvalidInput: a JSON file is broken.
    """
    rows: list[FolderDifference] = []
    adapter = not (tuned / "config.json").is_file()
    for name in SETTINGS:
        left, right = settings_of(base / name), settings_of(tuned / name)
        if adapter and not (tuned / name).is_file():
            continue
        rows += setting_differences(name, left, right)
    rows += tokenizer_differences(base, tuned, adapter)
    rows += slow_tokenizer_differences(base, tuned)
    rows += template_differences(base, tuned, adapter)
    return sorted(rows, key=lambda row: (row.severity != "finding", row.file, row.key))
