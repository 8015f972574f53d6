"""sparsify of EleutherAI: `cfg.json` with `sae.safetensors` in a folder named for its hook, such as `layers.10`."""

from pathlib import Path

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.fields import Fields, has, site_of
from molehunt.dictionary.formats.format import DictionaryFormat
from molehunt.dictionary.formats.tensors import read_safetensors
from molehunt.dictionary.nonlinearity import GroupMaxActivation, Nonlinearity, TopKActivation

FILES = ("cfg.json", "sae.safetensors")
REFUSED = ("signed", "embed_skip", "gram_lookup")


def recognises(folder: Path) -> bool:
    return has(folder, *FILES)


def read(folder: Path) -> Dictionary:
    config, tensors = Fields.read(folder, "cfg.json"), read_safetensors(folder, "sae.safetensors")
    for name in REFUSED:
        if config.flag(name, False):
            raise config.wrong(name, "is set, and such dictionaries are not read")
    d_dict, d_in = tensors.shape("encoder.weight")
    config.agree("d_in", d_in)
    if config.values.get("num_latents"):
        config.agree("num_latents", d_dict)
    d_out = tensors.shape("W_dec")[1]
    transcodes = config.flag("transcode", False)
    k = config.count("k")
    kind = config.text("activation", "topk")
    nonlinearity: Nonlinearity
    if kind == "topk":
        if k > d_dict:
            raise config.wrong("k", f"is {k} and there are {d_dict} latents")
        nonlinearity = TopKActivation(k)
    elif kind == "groupmax":
        if d_dict % k:
            raise config.wrong("k", f"is {k} and does not divide {d_dict} latents into groups")
        nonlinearity = GroupMaxActivation(k)
    else:
        raise config.wrong("activation", "should be topk or groupmax; others are not read")
    skips = "W_skip" in tensors or config.flag("skip_connection", False)
    hook = folder.resolve().name
    if not transcodes and d_out != d_in:
        raise tensors.wrong("W_dec", f"writes {d_out} values and the encoder reads {d_in}")
    dictionary = Dictionary(
        W_enc=tensors.take("encoder.weight", d_dict, d_in).T.contiguous(),
        b_enc=tensors.take("encoder.bias", d_dict),
        W_dec=tensors.take("W_dec", d_dict, d_out),
        b_dec=tensors.take("b_dec", d_out),
        nonlinearity=nonlinearity,
        center=not transcodes,
        W_skip=tensors.take("W_skip", d_out, d_in).T.contiguous() if skips else None,
        site=None if transcodes else site_of(hook),
        meta={"family": "sparsify", "hook_name": hook},
    )
    tensors.done()
    return dictionary


FORMAT = DictionaryFormat(
    family="sparsify",
    wants=(" and ".join(FILES),),
    recognises=recognises,
    read=lambda folder, options: read(folder),
)
