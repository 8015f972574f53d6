"""Differences between two folders besides their weights: a backdoor needs no weight change.

Configuration, generation settings, tokenizer and chat template are compared by meaning. Templates are also rendered on
fixed conversations on both sides, because the model sees only the rendered text.
"""

from pathlib import Path

from molehunt.checkpoint.adapter_folder import is_adapter_folder
from molehunt.checkpoint.difference import FolderDifference
from molehunt.checkpoint.settings_diff import SETTINGS, setting_differences
from molehunt.checkpoint.template_diff import template_differences
from molehunt.checkpoint.tokenizer_diff import tokenizer_differences, tokenizers_said


def folder_differences(base: Path, tuned: Path, *, tokenizers: bool = True) -> list[FolderDifference]:
    """Every difference in meaning between two folders, findings first.

    A file that an adapter folder lacks is no difference, because loaders take the file of the base.

    Args:
        base: folder of the base.
        tuned: folder of the fine-tune or its adapter.
        tokenizers: whether tokenizers are compared, which says nothing where the two are different models.

    Raises:
        InvalidInput: a JSON file or a tokenizer is broken.
    """
    adapter = is_adapter_folder(tuned)
    found = list(tokenizer_differences(base, tuned, adapter)) if tokenizers else []
    said = tokenizers_said(found) if tokenizers else "the tokenizers were not compared"
    rows = list(found)
    for name in SETTINGS:
        if not adapter or (name != "config.json" and (tuned / name).is_file()):
            rows += setting_differences(name, base, tuned, said, inherits=adapter)
    rows += template_differences(base, tuned, adapter)
    return sorted(rows, key=lambda row: (row.severity != "finding", row.file, row.key))
