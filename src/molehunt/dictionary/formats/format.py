"""What a dictionary format says of itself: whether a folder is its own, and how the folder is read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from molehunt.dictionary.dictionary import Dictionary

GROUP = "molehunt.dictionary_formats"
"""Entry points of plugins that offer formats."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a caller may say besides the folder. A format ignores what it does not need."""

    file: str | None = None
    """The file that was named, for folders that hold several dictionaries."""
    k: int | None = None
    """Number of latents that fire, for formats whose files do not hold it."""


@dataclass(frozen=True, kw_only=True)
class DictionaryFormat:
    """One family of dictionary files.

    Example:
        >>> FORMAT = DictionaryFormat(
        ...     family="My SAEs",
        ...     wants=("my_config.json and my_weights.safetensors",),
        ...     recognises=lambda folder: (folder / "my_config.json").is_file(),
        ...     read=lambda folder, options: my_reader(folder),
        ... )  # doctest: +SKIP
    """

    family: str
    """Name of the family, for messages."""
    wants: tuple[str, ...]
    """The files by which a folder is recognised, for the message that none was; one text for each form."""
    recognises: Callable[[Path], bool]
    """Whether a folder is of this family, judged by the names of its files alone."""
    read: Callable[[Path, ReadOptions], Dictionary]
    """The dictionary in a folder."""
    takes_k: bool = False
    """Whether `k` says something that the files do not."""
