"""Gemma Scope: `layer_L/width_W/average_l0_N/params.npz`, JumpReLU. Source: arXiv 2408.05147."""

import re
from pathlib import Path

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.fields import has
from molehunt.dictionary.formats.format import DictionaryFormat
from molehunt.dictionary.formats.tensors import Tensors, read_npz
from molehunt.dictionary.nonlinearity import JumpReLUActivation
from molehunt.site import Site

FILES = ("params.npz",)
_RELEASE = re.compile(r"gemma-scope-\w+-(?:pt|it)-(res|mlp|att|transcoders)")


def recognises(folder: Path) -> bool:
    return has(folder, *FILES)


def read(folder: Path) -> Dictionary:
    """Embedding dictionaries, known by their folder's name, were trained on embeddings times √d."""
    stored = read_npz(folder, "params.npz")
    tensors = Tensors(stored.file, {re.sub("^w_", "W_", name): value for name, value in stored.values.items()})
    tensors.unscaled()
    d_in, d_dict = tensors.shape("W_enc")
    d_out = tensors.shape("W_dec")[1]
    W_enc, W_dec = tensors.take("W_enc", d_in, d_dict), tensors.take("W_dec", d_dict, d_out)
    b_enc, b_dec = tensors.take("b_enc", d_dict), tensors.take("b_dec", d_out)
    threshold = tensors.threshold(d_dict)
    tensors.done()
    parts = folder.resolve().parts
    if "embedding" in parts[-3:]:
        W_enc, W_dec = W_enc / d_in**0.5, W_dec * d_in**0.5
    layer = next((int(m[1]) for part in parts[-3:] if (m := re.fullmatch(r"layer_(\d{1,6})", part))), None)
    release = next((m for part in reversed(parts) if (m := _RELEASE.search(part))), None)
    meta: dict[str, object] = {"family": "gemma_scope"}
    if release is not None:
        meta["release"] = release[0]
    if layer is not None:
        meta["layer"] = layer
    return Dictionary(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        nonlinearity=JumpReLUActivation(threshold),
        site=Site(layer) if release is not None and release[1] == "res" and layer is not None else None,
        meta=meta,
    )


FORMAT = DictionaryFormat(
    family="Gemma Scope",
    wants=(" and ".join(FILES),),
    recognises=recognises,
    read=lambda folder, options: read(folder),
)
