"""SAELens: `cfg.json` with `sae_weights.safetensors`, read and written. This is also molehunt's own format on disk.

What SAELens has no field for (pairing, site, meta) stands in `metadata.molehunt`, which it carries along unread. A
crosscoder is written as a dictionary over 2d values.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from molehunt.dictionary.dictionary import Dictionary, InputNorm
from molehunt.dictionary.formats.fields import Fields, has, site_of
from molehunt.dictionary.formats.format import DictionaryFormat
from molehunt.dictionary.formats.tensors import Tensors, read_safetensors
from molehunt.dictionary.nonlinearity import (
    GatedActivation,
    JumpReLUActivation,
    Nonlinearity,
    ReLUActivation,
    TopKActivation,
)
from molehunt.dictionary.pairing import Pairing
from molehunt.errors import UsageError
from molehunt.run.whole import replace_whole
from molehunt.site import Site

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FILES = (CONFIG, WEIGHTS)
OWN = "molehunt"
WRITTEN_FOR = "6.50.0"
"""SAELens takes a cfg without a version for one from before 6.0."""
NORMS: dict[str, InputNorm] = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
KEPT = ("model_name", "hook_name", "hook_name_out", "hook_head_index", "prepend_bos", "context_size", "dataset_path")
"""Facts about the training that go into `meta`."""


def recognises(folder: Path) -> bool:
    return has(folder, *FILES)


def read(folder: Path) -> Dictionary:
    """Written by SAELens 6, by one before 6.0 or by `save_dictionary`.

    Raises:
        InvalidInput: something is broken, or of a kind that is refused by name.
    """
    config, tensors = _upgraded(Fields.read(folder, CONFIG)), read_safetensors(folder, WEIGHTS)
    kind = config.text("architecture")
    if kind not in ARCHITECTURES + TRANSCODERS:
        raise config.wrong("architecture", f"is not one that is read: {', '.join(ARCHITECTURES + TRANSCODERS)}")
    transcodes = kind in TRANSCODERS
    tensors.unscaled()
    d_in, d_dict = tensors.shape("W_enc")
    config.agree("d_in", d_in)
    config.agree("d_sae", d_dict)
    d_out = tensors.shape("W_dec")[1] if transcodes else d_in
    if transcodes:
        config.agree("d_out", d_out)
    norm, center = _norm(config), config.flag("apply_b_dec_to_input", not transcodes)
    if transcodes and (center or norm != "none"):
        field = "apply_b_dec_to_input" if center else "normalize_activations"
        raise config.wrong(field, "is set for a transcoder, which SAELens does not do")
    W_enc, W_dec = tensors.take("W_enc", d_in, d_dict), tensors.take("W_dec", d_dict, d_out)
    b_dec = tensors.take("b_dec", d_out)
    nonlinearity = _nonlinearity(config, tensors, kind, d_dict)
    b_enc = W_enc.new_zeros(d_dict) if kind == "gated" else tensors.take("b_enc", d_dict)
    if kind == "topk" and config.flag("rescale_acts_by_decoder_norm", False):
        length = W_dec.norm(dim=-1)
        W_enc, b_enc = W_enc * length, b_enc * length
        W_dec = W_dec / torch.where(length > 0, length, 1.0)[:, None]
    W_skip = tensors.take("W_skip", d_out, d_in).T.contiguous() if "skip" in kind else None
    tensors.done()
    return Dictionary(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        nonlinearity=nonlinearity,
        center=center,
        norm=norm,
        W_skip=W_skip,
        **_metadata(config, d_in),
    )


def _upgraded(config: Fields) -> Fields:
    """A cfg from before 6.0 is flat and has other names; this is what SAELens makes of it."""
    if "metadata" in config:
        return config
    new = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
    values: dict[str, Any] = {new.get(name, name): value for name, value in config.values.items()}
    flat = Fields(config.file, values)
    activation = flat.text("activation_fn", "relu")
    if activation == "topk":
        settings = flat.below("activation_fn_kwargs")
        values |= {"architecture": "topk", "k": settings.count("k")}
    elif activation != "relu":
        raise config.wrong("activation_fn_str", "should be relu or topk; others are not read")
    if values.get("architecture") is None:
        values["architecture"] = "standard"
    norm = values.get("normalize_activations")
    if norm is None or isinstance(norm, bool):
        values["normalize_activations"] = "expected_average_only_in" if norm else "none"
    if "reshape_activations" not in flat:
        values["reshape_activations"] = "hook_z" if "hook_z" in flat.text("hook_name", "") else "none"
    values["metadata"] = {name: values[name] for name in KEPT if name in flat}
    return flat


def _norm(config: Fields) -> InputNorm:
    norm = config.text("normalize_activations", "none")
    if norm not in NORMS:
        raise config.wrong(
            "normalize_activations",
            f"is not one that is read ({', '.join(NORMS)}); expected_average_only_in and covariance_whitening need "
            "numbers that the file does not hold: save it again with them folded in",
        )
    return NORMS[norm]


def _nonlinearity(config: Fields, tensors: Tensors, kind: str, d_dict: int) -> Nonlinearity:
    if kind == "gated":
        fires = GatedActivation(*(tensors.take(name, d_dict) for name in ("b_gate", "r_mag", "b_mag")))
        tensors.exp("r_mag", fires.r_mag)
        return fires
    if kind == "topk":
        k = config.count("k")
        if k > d_dict:
            raise config.wrong("k", f"is {k} and there are {d_dict} latents")
        return TopKActivation(k)
    return JumpReLUActivation(tensors.threshold(d_dict)) if kind.startswith("jumprelu") else ReLUActivation()


def _metadata(config: Fields, d_in: int) -> dict[str, Any]:
    """Pairing, site and meta: our own where Molehunt wrote them, otherwise what hook and model names say."""
    facts = config.below("metadata")
    shape = config.text("reshape_activations", "none")
    if shape not in ("none", "hook_z"):
        raise config.wrong("reshape_activations", "should be none or hook_z; others are not read")
    if OWN in facts:
        own = facts.below(OWN)
        for name in own.values.keys() - {"pairing", "site", "meta"}:
            raise own.wrong(name, "is not a field of ours: this was written by a later molehunt")
        pairing = _pairing(own)
        if pairing.kind == "both" and d_in % 2:
            raise own.wrong("pairing", f"is over two models, and {d_in} values do not split in two")
        return {"pairing": pairing, "site": _site(own), "meta": dict(own.below("meta").values)}
    meta = {"family": "sae_lens", **{name: facts.values[name] for name in KEPT if name in facts}}
    if shape != "none":
        meta["reshape_activations"] = shape  # heads side by side, as flattening [heads, d_head] gives them
    hook = facts.text("hook_name", "") or None
    model = facts.text("model_name", "") or None
    return {"site": site_of(hook, model), "meta": meta}


def _pairing(own: Fields) -> Pairing:
    try:
        return Pairing.from_json(dict(own.below("pairing").values))
    except (UsageError, TypeError, ValueError):
        raise own.wrong("pairing", "is not a pairing") from None


def _site(own: Fields) -> Site | None:
    try:
        return Site.parse(own.text("site")) if "site" in own else None
    except ValueError:
        raise own.wrong("site", "is not a site such as L6.resid") from None


def save_dictionary(dictionary: Dictionary, folder: Path | str) -> None:
    """Write a dictionary so that SAELens loads it too, and `read` gives it back. Replaces one that is there.

    Each file appears whole; one that is being replaced has no cfg.json meanwhile, so halves of two never meet.

    Raises:
        UsageError: SAELens has no form for it (GroupMax, TopK or gated transcoders), or it holds NaN.
    """
    folder = Path(folder)
    architecture, tensors, extra = _form(dictionary)
    stored = {name: value.detach().to("cpu", torch.float32).contiguous().clone() for name, value in tensors.items()}
    for name, value in stored.items():
        if not bool(value.isfinite().all()):
            raise UsageError(f"{name} of this dictionary holds NaN or infinity, and is not written.")
    meta = dict(dictionary.meta)
    own = {
        "pairing": dictionary.pairing.to_json(),
        "site": None if dictionary.site is None else str(dictionary.site),
        "meta": meta,
    }
    config = {
        "architecture": architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_dict,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": dictionary.center,
        "normalize_activations": next(name for name, norm in NORMS.items() if norm == dictionary.norm),
        "reshape_activations": "hook_z" if meta.get("reshape_activations") == "hook_z" else "none",
        **extra,
        "metadata": {
            **{name: meta[name] for name in KEPT if meta.get(name) is not None},
            **_hook(dictionary.site, meta),
            "sae_lens_version": WRITTEN_FOR,
            OWN: own,
        },
    }
    try:
        text = json.dumps(config, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the meta of this dictionary cannot be written as JSON: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    replace_whole(folder / WEIGHTS, lambda path: save_file(stored, path))
    replace_whole(folder / CONFIG, lambda path: path.write_text(text + "\n", encoding="utf-8"))


def _form(dictionary: Dictionary) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """SAELens' architecture, its tensors and what else its cfg holds."""
    fires, W_skip = dictionary.nonlinearity, dictionary.W_skip
    d_out = dictionary.W_dec.shape[1]
    tensors = {name: getattr(dictionary, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    kinds: dict[type, str] = {
        ReLUActivation: "standard",
        TopKActivation: "topk",
        JumpReLUActivation: "jumprelu",
        GatedActivation: "gated",
    }
    kind = kinds.get(type(fires))
    if kind is None:
        raise UsageError(
            f"SAELens has no dictionary that fires by {type(fires).__name__.removesuffix('Activation')}; it cannot be written."
        )
    if isinstance(fires, JumpReLUActivation):
        tensors["threshold"] = fires.threshold
    if isinstance(fires, GatedActivation):
        bias = tensors.pop("b_enc")
        tensors |= {"b_gate": fires.b_gate + bias, "b_mag": fires.b_mag + bias * fires.r_mag.exp()}
        tensors["r_mag"] = fires.r_mag
    if W_skip is None and d_out == dictionary.d_in:
        return kind, tensors, {"k": fires.k} if isinstance(fires, TopKActivation) else {}
    if kind not in ("standard", "jumprelu") or dictionary.center or dictionary.norm != "none":
        raise UsageError("SAELens has transcoders that fire by ReLU or JumpReLU, without centring and norms alone.")
    if W_skip is not None:
        tensors["W_skip"] = W_skip.T
    prefix, skip = "jumprelu_" if kind == "jumprelu" else "", "skip_" if W_skip is not None else ""
    return f"{prefix}{skip}transcoder", tensors, {"d_out": d_out}


def _hook(site: Site | None, meta: Mapping[str, Any]) -> dict[str, str]:
    """TransformerLens' name of a site, where the meta has none."""
    if site is None or meta.get("hook_name") is not None:
        return {}
    place = {"resid": "resid_post", "attn": "attn_out", "mlp": "mlp_out"}[site.stream]
    return {"hook_name": f"blocks.{site.layer}.hook_{place}"}


FORMAT = DictionaryFormat(
    family="SAELens",
    wants=(" and ".join(FILES),),
    recognises=recognises,
    read=lambda folder, options: read(folder),
)
