"""A dictionary from a folder of any family that is known, told apart by file names alone."""

from pathlib import Path

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    qwen_scope,
    sae_lens,
    sparsify,
)
from molehunt.dictionary.formats.fields import check_model_width
from molehunt.errors import InvalidInput, MolehuntError, UsageError, printable

FAMILIES = {
    "SAELens": sae_lens,
    "sparsify": sparsify,
    "Gemma Scope": gemma_scope,
    "Gemma Scope 2": gemma_scope_2,
    "Llama Scope": llama_scope,
    "dictionary_learning": dictionary_learning,
    "Qwen Scope": qwen_scope,
}
"""In the order in which they are tried; a folder that fits two is refused."""


def load_dictionary(path: Path | str, *, d_model: int | None = None, k: int | None = None) -> Dictionary:
    """A trained dictionary in the one form that everything here works on, in fp32.

    Args:
        path: its folder; a file in it where the folder holds several dictionaries (Qwen Scope, cross-layer ones).
        d_model: width of the model that it shall be used with; another width raises UsageError.
        k: latents that fire, for Qwen Scope alone, where the folder's name does not tell.

    Raises:
        UsageError: no such folder, or an argument is needed or does not fit.
        InvalidInput: no family fits, or a file is broken, hostile or refused.
    """
    told = Path(path)
    folder, file = (told.parent, told.name) if told.is_file() else (told, None)
    if not folder.is_dir():
        raise UsageError(f"{printable(str(path))} is neither a folder nor a file.")
    fits = [name for name, family in FAMILIES.items() if family.holds(folder)]
    if len(fits) != 1:
        raise InvalidInput(
            _none(folder) if not fits else f"{printable(folder.name)} fits {' and '.join(fits)} at once."
        )
    family = FAMILIES[fits[0]]
    if k is not None and family is not qwen_scope:
        raise UsageError(f"k is told by the files of {fits[0]}; leave it out.")
    try:
        if family is qwen_scope:
            dictionary = qwen_scope.read(folder, file=file, k=k)
        elif family is gemma_scope_2:
            named = file if file in gemma_scope_2.files(folder) else None
            dictionary = gemma_scope_2.read(folder, file=named)
        else:
            dictionary = family.read(folder)
    except MolehuntError:
        raise
    except OSError as error:
        raise InvalidInput(f"{printable(folder.name)} cannot be read: {error.strerror}.") from None
    check_model_width(dictionary.d_in, dictionary.pairing.blocks, d_model)
    return dictionary


def _none(folder: Path) -> str:
    wanted = [f"{name}: {' and '.join(family.FILES)}" for name, family in FAMILIES.items()]
    wanted.append(f"Llama Scope, newer: {' and '.join(llama_scope.NEWER_FILES)}")
    return f"{printable(folder.name)} is no dictionary of a known family. Looked for\n  " + "\n  ".join(wanted)
