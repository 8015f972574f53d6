"""dictionary_learning: `ae.pt` with `config.json`, whose `trainer.dict_class` names the architecture."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.fields import Fields, has, site_of
from molehunt.dictionary.formats.format import DictionaryFormat
from molehunt.dictionary.formats.tensors import Tensors, read_torch
from molehunt.dictionary.nonlinearity import (
    GatedActivation,
    JumpReLUActivation,
    Nonlinearity,
    ReLUActivation,
    TopKActivation,
)
from molehunt.site import Site

FILES = ("ae.pt", "config.json")
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Nonlinearity, bool]
"""W_enc, b_enc, W_dec, b_dec, how latents fire, whether b_dec is taken off the input."""


def recognises(folder: Path) -> bool:
    return has(folder, *FILES)


def read(folder: Path) -> Dictionary:
    trainer = Fields.read(folder, "config.json").below("trainer")
    kind = trainer.text("dict_class")
    if kind not in _KINDS:
        raise trainer.wrong("dict_class", f"is not one that is read: {', '.join(_KINDS)}")
    tensors = read_torch(folder, "ae.pt")
    W_enc, b_enc, W_dec, b_dec, nonlinearity, center = _KINDS[kind](tensors)
    tensors.done()
    trainer.agree("activation_dim", W_enc.shape[0])
    trainer.agree("dict_size", W_enc.shape[1])
    if isinstance(nonlinearity, TopKActivation):
        if "k" in trainer and trainer.count("k") != nonlinearity.k:
            raise trainer.wrong("k", f"is {trainer.count('k')} and ae.pt has {nonlinearity.k}")
        if nonlinearity.k > W_enc.shape[1]:
            raise tensors.wrong("k", f"is {nonlinearity.k} and there are {W_enc.shape[1]} latents")
    meta: dict[str, object] = {"family": "dictionary_learning", "dict_class": kind}
    for key, name in (("lm_name", "model_name"), ("submodule_name", "hook_name")):
        if key in trainer:
            meta[name] = trainer.text(key)
    if kind.startswith("Matryoshka"):
        sizes: list[int] = tensors.values["group_sizes"].tolist()
        if sum(sizes) != W_enc.shape[1]:
            raise tensors.wrong("group_sizes", f"adds up to {sum(sizes)} and there are {W_enc.shape[1]} latents")
        meta["group_sizes"] = sizes
    return Dictionary(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        nonlinearity=nonlinearity,
        center=center,
        site=_site(trainer.text("submodule_name", "")),
        meta=meta,
    )


def _site(module: str) -> Site | None:
    found = re.fullmatch(r"resid_post_layer_(\d{1,6})", module)
    return Site(int(found[1])) if found else site_of(module)


def _linear(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Encoder and decoder of files that hold linear layers, transposed."""
    d_dict, d_in = tensors.shape("encoder.weight")
    W_enc, W_dec = tensors.take("encoder.weight", d_dict, d_in), tensors.take("decoder.weight", d_in, d_dict)
    return W_enc.T.contiguous(), W_dec.T.contiguous()


def _plain(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encoder and decoder of files that hold the matrices of the formula."""
    d_in, d_dict = tensors.shape("W_enc")
    return (
        tensors.take("W_enc", d_in, d_dict),
        tensors.take("b_enc", d_dict),
        tensors.take("W_dec", d_dict, d_in),
        tensors.take("b_dec", d_in),
    )


def _standard(tensors: Tensors) -> Parts:
    W_enc, W_dec = _linear(tensors)
    d_in, d_dict = W_enc.shape
    return W_enc, tensors.take("encoder.bias", d_dict), W_dec, tensors.take("bias", d_in), ReLUActivation(), True


def _new(tensors: Tensors) -> Parts:
    W_enc, W_dec = _linear(tensors)
    d_in, d_dict = W_enc.shape
    return (
        W_enc,
        tensors.take("encoder.bias", d_dict),
        W_dec,
        tensors.take("decoder.bias", d_in),
        ReLUActivation(),
        False,
    )


def _top_k(tensors: Tensors) -> Parts:
    W_enc, W_dec = _linear(tensors)
    d_in, d_dict = W_enc.shape
    if "threshold" in tensors:
        tensors.threshold(d_dict)  # measured in training; the package's own encoder takes the k largest
    k = int(tensors.whole("k"))
    return W_enc, tensors.take("encoder.bias", d_dict), W_dec, tensors.take("b_dec", d_in), TopKActivation(k), True


def _batch_top_k(tensors: Tensors) -> Parts:
    W_enc, W_dec = _linear(tensors)
    d_in, d_dict = W_enc.shape
    tensors.whole("k")
    fires = JumpReLUActivation(tensors.threshold(d_dict))
    return W_enc, tensors.take("encoder.bias", d_dict), W_dec, tensors.take("b_dec", d_in), fires, True


def _matryoshka(tensors: Tensors) -> Parts:
    parts = _plain(tensors)
    tensors.whole("k")
    tensors.whole("group_sizes", *tensors.shape("group_sizes", 1))
    return *parts, JumpReLUActivation(tensors.threshold(parts[0].shape[1])), True


def _jump_relu(tensors: Tensors) -> Parts:
    parts = _plain(tensors)
    return *parts, JumpReLUActivation(tensors.threshold(parts[0].shape[1])), False


def _gated(tensors: Tensors) -> Parts:
    W_enc, W_dec = _linear(tensors)
    d_in, d_dict = W_enc.shape
    fires = GatedActivation(*(tensors.take(name, d_dict) for name in ("gate_bias", "r_mag", "mag_bias")))
    tensors.exp("r_mag", fires.r_mag)
    return W_enc, torch.zeros(d_dict), W_dec, tensors.take("decoder_bias", d_in), fires, True


_KINDS: dict[str, Callable[[Tensors], Parts]] = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _new,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jump_relu,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}


FORMAT = DictionaryFormat(
    family="dictionary_learning",
    wants=(" and ".join(FILES),),
    recognises=recognises,
    read=lambda folder, options: read(folder),
)
