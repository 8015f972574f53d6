"""Llama Scope: `hyperparams.json` with `checkpoints/final.safetensors`, and the newer `config.json` form (R1-Distill).

The codes are those of the authors' normalised space, x·√d/(mean norm). Two facts that other readers leave out: the
threshold of the older form was measured after folding that scale back, so it is multiplied by it here; and where
`sparsity_include_decoder_norm` is set, a pre-activation is compared times its decoder's length. Source: arXiv
2410.20526 and OpenMOSS/Language-Model-SAEs.
"""

import math
from pathlib import Path

from torch import Tensor

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.fields import Fields, has, site_of
from molehunt.dictionary.formats.format import DictionaryFormat
from molehunt.dictionary.formats.tensors import Tensors, read_safetensors
from molehunt.dictionary.nonlinearity import JumpReLUActivation

FILES = ("hyperparams.json", "checkpoints/final.safetensors")
NEWER_FILES = ("config.json", "sae_weights.safetensors")


def recognises(folder: Path) -> bool:
    return has(folder, *FILES) or (has(folder, *NEWER_FILES) and not has(folder, "cfg.json"))


def read(folder: Path) -> Dictionary:
    newer = not has(folder, FILES[0])
    config_name, weights_name = NEWER_FILES if newer else FILES
    config, tensors = Fields.read(folder, config_name), read_safetensors(folder, weights_name)
    _refuse(config)
    d_dict, d_in = tensors.shape("encoder.weight")
    config.agree("d_model", d_in)
    config.agree("d_sae", d_dict)
    hook = config.text("hook_point_in")
    scale_in, scale_out = _scales(config, tensors, d_in, hook)
    stored = tensors.take("decoder.weight", d_in, d_dict)
    if newer:
        threshold = tensors.threshold(d_dict, "jumprelu_threshold")
    else:
        threshold = stored.new_full((d_dict,), config.positive("jump_relu_threshold", zero=True) * scale_out)
    if config.flag("sparsity_include_decoder_norm", False):
        length = stored.norm(dim=0)
        threshold = threshold / length.clamp(min=1e-12)
    b_dec = tensors.take("decoder.bias", d_in) if config.flag("use_decoder_bias", True) else stored.new_zeros(d_in)
    dictionary = Dictionary(
        W_enc=(tensors.take("encoder.weight", d_dict, d_in).T * scale_in).contiguous(),
        b_enc=tensors.take("encoder.bias", d_dict),
        W_dec=(stored.T / scale_out).contiguous(),
        b_dec=b_dec / scale_out,
        nonlinearity=JumpReLUActivation(threshold),
        center=config.flag("apply_decoder_bias_to_pre_encoder", False),
        site=site_of(hook) if config.text("hook_point_out", hook) == hook else None,
        meta={"family": "llama_scope", "hook_name": hook},
    )
    if dictionary.center and scale_in != scale_out:
        raise config.wrong("apply_decoder_bias_to_pre_encoder", "is set for a transcoder, which is not read")
    tensors.done()
    return dictionary


def _refuse(config: Fields) -> None:
    if config.text("act_fn", "jumprelu").lower() != "jumprelu":
        raise config.wrong("act_fn", "should be jumprelu; other kinds of Llama Scope are not read")
    if config.flag("use_glu_encoder", False):
        raise config.wrong("use_glu_encoder", "is set, and gated linear encoders are not read")
    if config.text("sae_type", "sae") != "sae":
        raise config.wrong("sae_type", "should be sae; other kinds are not read")


def _scales(config: Fields, tensors: Tensors, d_in: int, hook: str) -> tuple[float, float]:
    """√d over the mean norm of inputs and outputs: in the config, or beside the weights under the hooks' names."""
    norm = config.text("norm_activation", "dataset-wise")
    prefix = "dataset_average_activation_norm"
    beside = {
        name: math.sqrt(d_in) / _above_zero(tensors, name) for name in tensors.values if name.startswith(f"{prefix}.")
    }
    if norm == "inference":
        return 1.0, 1.0
    if norm != "dataset-wise":
        raise config.wrong("norm_activation", "should be dataset-wise or inference; other scales are not read")
    if beside:
        missing = next((n for n in (f"{prefix}.{hook}",) if n not in beside), None)
        if missing:
            raise tensors.wrong(missing, "is missing")
        out = config.text("hook_point_out", hook)
        return beside[f"{prefix}.{hook}"], beside.get(f"{prefix}.{out}", beside[f"{prefix}.{hook}"])
    norms = config.below(prefix)
    scale_in = math.sqrt(d_in) / norms.positive("in")
    return scale_in, math.sqrt(d_in) / norms.positive("out") if "out" in norms else scale_in


def _above_zero(tensors: Tensors, name: str) -> float:
    value: Tensor = tensors.spread(name, 1)
    if float(value) <= 0:
        raise tensors.wrong(name, "should be above 0")
    return float(value)


FORMAT = DictionaryFormat(
    family="Llama Scope",
    wants=(" and ".join(FILES), f"{' and '.join(NEWER_FILES)} (newer form)"),
    recognises=recognises,
    read=lambda folder, options: read(folder),
)
