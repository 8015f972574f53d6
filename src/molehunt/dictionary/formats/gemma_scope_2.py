"""Gemma Scope 2: `config.json` with `params.safetensors`, JumpReLU dictionaries, transcoders and cross-layer ones."""

from pathlib import Path

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.fields import Fields, has, site_of
from molehunt.dictionary.formats.format import DictionaryFormat, ReadOptions
from molehunt.dictionary.formats.tensors import read_safetensors
from molehunt.dictionary.nonlinearity import JumpReLUActivation
from molehunt.errors import InvalidInput, UsageError

FILES = ("config.json", "params.safetensors")


def files(folder: Path) -> list[str]:
    """One file; cross-layer transcoders have one `params_layer_L.safetensors` for each layer."""
    return sorted(path.name for path in folder.glob("params*.safetensors"))


def recognises(folder: Path) -> bool:
    return has(folder, "config.json") and bool(files(folder))


def read(folder: Path, *, file: str | None = None) -> Dictionary:
    """Cross-layer transcoders come back with their writes to all layers summed.

    Args:
        folder: of one dictionary.
        file: which of its `files`, where there are several.
    """
    config = Fields.read(folder, "config.json")
    if config.text("architecture") != "jump_relu":
        raise config.wrong("architecture", "should be jump_relu; other kinds of Gemma Scope 2 are not known")
    there = files(folder)
    if file is None and len(there) != 1:
        if not there:
            raise InvalidInput(f"{folder.name} has no params.safetensors. Fetch the folder again.")
        raise UsageError(f"{folder.name} holds {len(there)} dictionaries: name a file, such as {there[0]}.")
    tensors = read_safetensors(folder, file or there[0])
    d_in, d_dict = tensors.shape("w_enc")
    crosses = "w_dec" in tensors and tensors.values["w_dec"].ndim == 3
    stored = tensors.shape("w_dec", 3 if crosses else 2)
    d_out = stored[-1]
    W_dec = tensors.take("w_dec", d_dict, *stored[1:])
    W_skip = None
    if "affine_skip_connection" in tensors or config.flag("affine_connection", False):
        W_skip = tensors.take("affine_skip_connection", d_in, d_out)
    read_out = config.text("hf_hook_point_out", "")
    read_in = config.text("hf_hook_point_in", "")
    model = config.text("model_name", "")
    dictionary = Dictionary(
        W_enc=tensors.take("w_enc", d_in, d_dict),
        b_enc=tensors.take("b_enc", d_dict),
        W_dec=W_dec.sum(1) if crosses else W_dec,
        b_dec=tensors.take("b_dec", d_out),
        nonlinearity=JumpReLUActivation(tensors.threshold(d_dict)),
        W_skip=W_skip,
        site=site_of(read_in),
        meta={
            "family": "gemma_scope_2",
            "model_name": model,
            "hook_name": read_in,
            **({"hook_name_out": read_out} if read_out else {}),
        },
    )
    tensors.done()
    return dictionary


def _read(folder: Path, options: ReadOptions) -> Dictionary:
    """A file that holds no weights, such as the config, names no dictionary."""
    return read(folder, file=options.file if options.file in files(folder) else None)


FORMAT = DictionaryFormat(
    family="Gemma Scope 2",
    wants=(" and ".join(FILES),),
    recognises=recognises,
    read=_read,
)
