"""Reads a dictionary from a folder of any known family. The formats tell the families apart by file names alone."""

from pathlib import Path

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.catalog import CATALOG
from molehunt.dictionary.formats.fields import check_model_width
from molehunt.dictionary.formats.format import GROUP, DictionaryFormat, ReadOptions
from molehunt.errors import InvalidInput, MolehuntError, UsageError, printable
from molehunt.run.catalog import load, names


def dictionary_formats() -> tuple[DictionaryFormat, ...]:
    """Every format of the catalogue, in its order, and those of plugins.

    Raises:
        UsageError: a plugin's entry point leads to something else than a DictionaryFormat.
    """
    plugins = [name for name in names(CATALOG, GROUP) if name not in CATALOG]
    found: list[DictionaryFormat] = []
    for name in (*CATALOG, *plugins):
        form = load(CATALOG, name, GROUP)
        if not isinstance(form, DictionaryFormat):
            raise UsageError(f"The plugin {printable(name)} ({GROUP}) is no DictionaryFormat. Mend or uninstall it.")
        found.append(form)
    return tuple(found)


def load_dictionary(path: Path | str, *, d_model: int | None = None, k: int | None = None) -> Dictionary:
    """A trained dictionary in the one form that everything here works on, in fp32.

    Args:
        path: its folder, or one file where the folder holds several dictionaries (Qwen Scope, cross-layer ones).
        d_model: width of the model that it is to be used with; another width raises UsageError.
        k: number of latents that fire, for Qwen Scope alone, where the folder's name does not say it.

    Raises:
        UsageError: no such folder, or an argument is needed or does not fit.
        InvalidInput: no family fits, or a file is broken, hostile or refused.

    Example:
        >>> dictionary = load_dictionary("my-sae", d_model=4096)  # doctest: +SKIP
    """
    given = Path(path)
    folder, file = (given.parent, given.name) if given.is_file() else (given, None)
    if not folder.is_dir():
        raise UsageError(f"{printable(str(path))} is neither a folder nor a file.")
    formats = dictionary_formats()
    fits = [form for form in formats if form.recognises(folder)]
    if not fits:
        raise InvalidInput(_none(folder, formats))
    if len(fits) > 1:
        raise InvalidInput(f"{printable(folder.name)} fits {' and '.join(form.family for form in fits)} at once.")
    (form,) = fits
    if k is not None and not form.takes_k:
        raise UsageError(f"k stands in the files of {form.family}; leave it out.")
    try:
        dictionary = form.read(folder, ReadOptions(file=file, k=k))
    except MolehuntError:
        raise
    except OSError as error:
        raise InvalidInput(f"{printable(folder.name)} cannot be read: {error.strerror}.") from None
    check_model_width(dictionary.d_in, dictionary.pairing.blocks, d_model)
    return dictionary


def _none(folder: Path, formats: tuple[DictionaryFormat, ...]) -> str:
    wanted = [f"{form.family}: {files}" for form in formats for files in form.wants]
    return f"{printable(folder.name)} is no dictionary of a known family. Looked for\n  " + "\n  ".join(wanted)
