"""Qwen Scope: `layer{n}.sae.pt`, TopK; the number of latents that fire stands only in the release's name, `…-W32K-L0_50`."""

import re
from pathlib import Path

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.format import DictionaryFormat
from molehunt.dictionary.formats.tensors import read_torch
from molehunt.dictionary.nonlinearity import TopKActivation
from molehunt.errors import InvalidInput, UsageError
from molehunt.site import Site

FILES = ("layer{n}.sae.pt",)
_FILE = re.compile(r"layer(\d{1,6})\.sae\.pt")
_RELEASE = re.compile(r"SAE-Res-(.+)-W\d+K-L0_(\d{1,9})")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("layer*.sae.pt") if _FILE.fullmatch(path.name))


def recognises(folder: Path) -> bool:
    return bool(files(folder))


def read(folder: Path, *, file: str | None = None, k: int | None = None) -> Dictionary:
    """A dictionary of one layer.

    Args:
        folder: of a release.
        file: which of its `files`, where there are several.
        k: latents that fire; by default from the name of the folder or of one above it.
    """
    there = files(folder)
    if file is None and len(there) > 1:
        raise UsageError(f"{folder.name} holds {len(there)} dictionaries: name a file, such as {there[0]}.")
    if file is None and not there:
        raise InvalidInput(f"{folder.name} has no layer{{n}}.sae.pt. Fetch the folder again.")
    name = file or there[0]
    layer = _FILE.fullmatch(name)
    if layer is None:
        raise InvalidInput(f"{name} is not named like layer3.sae.pt, so its layer is not known.")
    named = next((m for part in reversed(folder.resolve().parts) if (m := _RELEASE.search(part))), None)
    if k is None:
        if named is None:
            raise UsageError(
                "how many latents of a Qwen Scope dictionary fire stands only in its release's name, such as "
                "SAE-Res-Qwen3-8B-Base-W64K-L0_50: keep that name on the folder, or give k."
            )
        k = int(named[2])
    tensors = read_torch(folder, name)
    d_dict, d_in = tensors.shape("W_enc")
    if not 1 <= k <= d_dict:
        raise InvalidInput(f"{name}: k is {k} and there are {d_dict} latents.")
    dictionary = Dictionary(
        W_enc=tensors.take("W_enc", d_dict, d_in).T.contiguous(),
        b_enc=tensors.take("b_enc", d_dict),
        W_dec=tensors.take("W_dec", d_in, d_dict).T.contiguous(),
        b_dec=tensors.take("b_dec", d_in),
        nonlinearity=TopKActivation(k),
        site=Site(int(layer[1])),
        meta={"family": "qwen_scope", **({"model_name": f"Qwen/{named[1]}"} if named else {})},
    )
    tensors.done()
    return dictionary


FORMAT = DictionaryFormat(
    family="Qwen Scope",
    wants=(" and ".join(FILES),),
    recognises=recognises,
    read=lambda folder, options: read(folder, file=options.file, k=options.k),
    takes_k=True,
)
