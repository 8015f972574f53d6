"""Each family's folder, written by its published definition, against that definition's own formula."""

import contextlib
import json
import math
import os
import stat
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.detect import FAMILIES, load_dictionary
from molehunt.dictionary.formats.fields import site_of
from molehunt.dictionary.formats.sae_lens import save_dictionary
from molehunt.dictionary.nonlinearity import Gated, GroupMax, JumpReLU, ReLU, TopK
from molehunt.dictionary.pairing import Pairing
from molehunt.errors import InvalidInput, UsageError
from molehunt.model.site import Site

D, F, K = 6, 12, 3
X = torch.randn(17, D, generator=torch.Generator().manual_seed(9)) * 2
Formula = tuple[Tensor, Tensor]


def draws(seed: int = 0) -> Callable[..., Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=rng) * 0.7


def positive(p: Tensor) -> Tensor:
    return p * (p > 0)


def keep_largest(p: Tensor, k: int) -> Tensor:
    """Row by row, by sorting."""
    out = torch.zeros_like(p)
    for row, values in enumerate(p):
        for latent in values.argsort(descending=True)[:k]:
            out[row, latent] = max(values[latent], torch.tensor(0.0))
    return out


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def lens(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None, **cfg: Any) -> None:
    told = {
        "architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2", "sae_lens_version": "6.5.0"},
    }  # fmt: skip
    write_json(folder / "cfg.json", told | ({} if metadata is None else {"metadata": metadata}) | cfg)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")


def four(seed: int = 0, d_out: int = D) -> dict[str, Tensor]:
    draw = draws(seed)
    return {"W_enc": draw(D, F), "b_enc": draw(F), "W_dec": draw(F, d_out), "b_dec": draw(d_out)}


def lens_standard(folder: Path) -> Formula:
    t = four()
    lens(folder, t)
    z = positive((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    return z, z @ t["W_dec"] + t["b_dec"]


def lens_layer_norm(folder: Path) -> Formula:
    t = four()
    lens(folder, t, normalize_activations="layer_norm", apply_b_dec_to_input=False)
    mean, std = X.mean(-1, keepdim=True), X.std(-1, keepdim=True)
    z = positive((X - mean) / (std + 1e-5) @ t["W_enc"] + t["b_enc"])
    return z, (z @ t["W_dec"] + t["b_dec"]) * std + mean


def lens_constant_norm(folder: Path) -> Formula:
    t = four()
    lens(folder, t, normalize_activations="constant_norm_rescale")
    scale = D**0.5 / X.norm(dim=-1, keepdim=True)
    z = positive((X * scale - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    return z, (z @ t["W_dec"] + t["b_dec"]) / scale


def lens_topk_rescaled(folder: Path) -> Formula:
    t = four()
    lens(folder, t, architecture="topk", k=K, rescale_acts_by_decoder_norm=True)
    length = (t["W_dec"] ** 2).sum(1).sqrt()
    z = keep_largest(((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * length, K)
    return z, (z / length) @ t["W_dec"] + t["b_dec"]


def lens_jumprelu(folder: Path) -> Formula:
    t = four() | {"threshold": draws(4)(F).abs()}
    lens(folder, t, architecture="jumprelu", apply_b_dec_to_input=False)
    p = X @ t["W_enc"] + t["b_enc"]
    z = p * (p > t["threshold"])
    return z, z @ t["W_dec"] + t["b_dec"]


def lens_gated(folder: Path) -> Formula:
    t, draw = four(), draws(5)
    del t["b_enc"]
    t |= {"b_gate": draw(F), "b_mag": draw(F), "r_mag": draw(F)}
    lens(folder, t, architecture="gated")
    x = X - t["b_dec"]
    gate = x @ t["W_enc"] + t["b_gate"] > 0
    z = gate * positive(x @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"])
    return z, z @ t["W_dec"] + t["b_dec"]


def lens_skip_transcoder(folder: Path) -> Formula:
    t = four(d_out=5) | {"W_skip": draws(6)(5, D), "threshold": draws(4)(F).abs()}
    lens(folder, t, architecture="jumprelu_skip_transcoder", d_out=5, apply_b_dec_to_input=False)
    p = X @ t["W_enc"] + t["b_enc"]
    z = p * (p > t["threshold"])
    return z, z @ t["W_dec"] + t["b_dec"] + torch.einsum("od,nd->no", t["W_skip"], X)


def lens_before_6(folder: Path) -> Formula:
    t = four()
    write_json(
        folder / "cfg.json",
        {
            "d_in": D, "d_sae": F, "dtype": "torch.float32", "hook_point": "blocks.3.hook_resid_post",
            "model_name": "gpt2", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
            "normalize_activations": False, "hook_point_head_index": None,
        },
    )  # fmt: skip
    save_file(t | {"scaling_factor": torch.ones(F)}, folder / "sae_weights.safetensors")
    z = keep_largest((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"], K)
    return z, z @ t["W_dec"] + t["b_dec"]


def gemma_scope(folder: Path, lower: bool = False) -> Formula:
    t = four() | {"threshold": draws(4)(F).abs()}
    named = {n.lower() if lower and n.startswith("W") else n: v.numpy() for n, v in t.items()}
    np.savez(folder / "params.npz", **named)
    W_enc, W_dec = t["W_enc"], t["W_dec"]
    if "embedding" in folder.parts:
        W_enc, W_dec = W_enc / math.sqrt(D), W_dec * math.sqrt(D)
    p = X @ W_enc + t["b_enc"]
    z = p * (p > t["threshold"])
    return z, z @ W_dec + t["b_dec"]


def gemma_scope_2(folder: Path, crosses: bool = False) -> Formula:
    draw, layers = draws(1), 4
    t = {"w_enc": draw(D, F), "b_enc": draw(F), "b_dec": draw(D), "threshold": draw(F).abs()}
    t["w_dec"] = draw(F, layers, D) if crosses else draw(F, D)
    t["affine_skip_connection"] = draw(D, D)
    write_json(
        folder / "config.json",
        {
            "architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "affine_connection": True,
            "hf_hook_point_in": "model.layers.3.output", "hf_hook_point_out": "model.layers.3.x.output",
        },
    )  # fmt: skip
    save_file(t, folder / ("params_layer_3.safetensors" if crosses else "params.safetensors"))
    p = X @ t["w_enc"] + t["b_enc"]
    z = p * (p > t["threshold"])
    W_dec = sum(t["w_dec"][:, i] for i in range(layers)) if crosses else t["w_dec"]
    return z, z @ W_dec + t["b_dec"] + X @ t["affine_skip_connection"]


def llama_scope(folder: Path, by_length: bool = False) -> Formula:
    """Authors' inference mode: codes and threshold in raw units there; ours are those of the normalised space."""
    draw, norm = draws(2), 5.0
    t = {"encoder.weight": draw(F, D), "encoder.bias": draw(F), "decoder.weight": draw(D, F), "decoder.bias": draw(D)}
    t = {n: v.bfloat16() for n, v in t.items()}
    write_json(
        folder / "hyperparams.json",
        {
            "d_model": D, "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": 0.4,
            "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post",
            "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": norm, "out": norm},
            "sparsity_include_decoder_norm": by_length, "use_glu_encoder": False,
            "apply_decoder_bias_to_pre_encoder": False,
        },
    )  # fmt: skip
    (folder / "checkpoints").mkdir()
    save_file(t, folder / "checkpoints" / "final.safetensors")
    s = math.sqrt(D) / norm
    raw = X @ t["encoder.weight"].float().T + t["encoder.bias"].float() / s  # what the authors call inference mode
    length = t["decoder.weight"].float().norm(dim=0) if by_length else 1.0
    fires = raw * length > 0.4
    decoded = (raw * fires) @ t["decoder.weight"].float().T + t["decoder.bias"].float() / s
    return raw * fires * s, decoded


def llama_scope_newer(folder: Path) -> Formula:
    draw, norm, hook = draws(2), 5.0, "blocks.3.hook_resid_post"
    t = {"encoder.weight": draw(F, D), "encoder.bias": draw(F), "decoder.weight": draw(D, F), "decoder.bias": draw(D)}
    t |= {"log_jumprelu_threshold": draw(F), f"dataset_average_activation_norm.{hook}": torch.tensor(norm)}
    write_json(
        folder / "config.json",
        {"d_model": D, "expansion_factor": 2, "hook_point_in": hook, "hook_point_out": hook, "act_fn": "jumprelu",
         "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False},
    )  # fmt: skip
    save_file(t, folder / "sae_weights.safetensors")
    p = (X * math.sqrt(D) / norm) @ t["encoder.weight"].T + t["encoder.bias"]
    z = p * (p > t["log_jumprelu_threshold"].exp())
    return z, (z @ t["decoder.weight"].T + t["decoder.bias"]) * norm / math.sqrt(D)


def sparsify(folder: Path, **cfg: Any) -> Formula:
    draw = draws(3)
    told = {"d_in": D, "k": K, "expansion_factor": 2, "num_latents": 0, "normalize_decoder": True, **cfg}
    t = {"encoder.weight": draw(F, D), "encoder.bias": draw(F), "W_dec": draw(F, D), "b_dec": draw(D)}
    if cfg.get("skip_connection"):
        t["W_skip"] = draw(D, D)
    write_json(folder / "cfg.json", told)
    save_file(t, folder / "sae.safetensors")
    x = X if cfg.get("transcode") else X - t["b_dec"]
    p = positive(x @ t["encoder.weight"].T + t["encoder.bias"])
    if cfg.get("activation") == "groupmax":
        z = torch.zeros_like(p)
        for row in range(len(p)):
            for group in range(0, F, F // K):
                best = group + int(p[row, group : group + F // K].argmax())
                z[row, best] = p[row, best]
    else:
        z = keep_largest(p, K)
    out = z @ t["W_dec"] + t["b_dec"]
    return z, out + X @ t["W_skip"].T if "W_skip" in t else out


def trainer(folder: Path, kind: str, t: dict[str, Tensor], **told: Any) -> None:
    write_json(
        folder / "config.json",
        {
            "trainer": {
                "trainer_class": "T", "dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 3,
                "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_3", **told,
            },
            "buffer": {"ctx_len": 128},
        },
    )  # fmt: skip
    torch.save(t, folder / "ae.pt")


def learned(folder: Path, kind: str) -> Formula:
    draw = draws(7)
    enc, dec = {"encoder.weight": draw(F, D), "encoder.bias": draw(F)}, {"decoder.weight": draw(D, F)}
    W, b, V = enc["encoder.weight"].T, enc["encoder.bias"], dec["decoder.weight"].T
    bias, threshold = draw(D), torch.tensor(0.6)
    counts = {"k": torch.tensor(K, dtype=torch.int), "threshold": threshold}
    if kind == "AutoEncoder":
        trainer(folder, kind, enc | dec | {"bias": bias})
        z = positive((X - bias) @ W + b)
    elif kind == "AutoEncoderNew":
        trainer(folder, kind, enc | dec | {"decoder.bias": bias})
        z = positive(X @ W + b)
    elif kind == "AutoEncoderTopK":
        trainer(folder, kind, enc | dec | counts | {"b_dec": bias}, k=K)
        z = keep_largest((X - bias) @ W + b, K)
    elif kind == "BatchTopKSAE":
        trainer(folder, kind, enc | dec | counts | {"b_dec": bias}, k=K)
        p = positive((X - bias) @ W + b)
        z = p * (p > threshold)
    elif kind == "MatryoshkaBatchTopKSAE":
        t = {"W_enc": W.clone(), "b_enc": b, "W_dec": V.clone(), "b_dec": bias}
        trainer(folder, kind, t | counts | {"group_sizes": torch.tensor([4, F - 4])}, k=K)
        p = positive((X - bias) @ W + b)
        z = p * (p > threshold)
    elif kind == "JumpReluAutoEncoder":
        levels = draw(F).abs()
        trainer(folder, kind, {"W_enc": W.clone(), "b_enc": b, "W_dec": V.clone(), "b_dec": bias, "threshold": levels})
        p = X @ W + b
        z = p * (p > levels)
    else:
        assert kind == "GatedAutoEncoder"
        gate = {"decoder_bias": bias, "gate_bias": draw(F), "mag_bias": draw(F), "r_mag": draw(F)}
        trainer(folder, kind, {"encoder.weight": enc["encoder.weight"]} | dec | gate)
        pi = (X - bias) @ W
        z = (pi + gate["gate_bias"] > 0) * positive(gate["r_mag"].exp() * pi + gate["mag_bias"])
    return z, z @ V + bias


def qwen_scope(folder: Path) -> Formula:
    draw = draws(8)
    t = {"W_enc": draw(F, D), "b_enc": draw(F), "W_dec": draw(D, F), "b_dec": draw(D)}
    torch.save(t, folder / "layer3.sae.pt")
    z = keep_largest(X @ t["W_enc"].T + t["b_enc"], K)
    return z, z @ t["W_dec"].T + t["b_dec"]


QWEN = f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
SCOPE = "gemma-scope-2b-pt-res"
CASES: dict[str, tuple[Callable[[Path], Formula], str, Site | None]] = {
    "lens standard": (lens_standard, "a", Site(3)),
    "lens layer_norm": (lens_layer_norm, "a", Site(3)),
    "lens constant norm": (lens_constant_norm, "a", Site(3)),
    "lens topk": (lens_topk_rescaled, "a", Site(3)),
    "lens jumprelu": (lens_jumprelu, "a", Site(3)),
    "lens gated": (lens_gated, "a", Site(3)),
    "lens transcoder": (lens_skip_transcoder, "a", Site(3)),
    "lens before 6": (lens_before_6, "a", Site(3)),
    "gemma scope": (gemma_scope, f"{SCOPE}/layer_3/width_16k/average_l0_82", Site(3)),
    "gemma scope, hub cache": (gemma_scope, f"models--google--{SCOPE}/snapshots/f0/layer_3/width_1m/l0_82", Site(3)),
    "gemma scope lower": (lambda f: gemma_scope(f, True), "layer_3/width_16k/average_l0_82", None),
    "gemma scope embedding": (gemma_scope, f"{SCOPE}/embedding/width_4k/average_l0_6", None),
    "gemma scope mlp": (gemma_scope, "gemma-scope-9b-pt-mlp/layer_3/width_16k/average_l0_82", None),
    "gemma scope 2": (gemma_scope_2, "resid_post/layer_3_width_16k_l0_small", Site(3)),
    "gemma scope 2 across": (lambda f: gemma_scope_2(f, True), "clt/width_16k", Site(3)),
    "llama scope": (llama_scope, "a", Site(3)),
    "llama scope by length": (lambda f: llama_scope(f, True), "a", Site(3)),
    "llama scope newer": (llama_scope_newer, "L3R", Site(3)),
    "sparsify": (sparsify, "layers.3", Site(3)),
    "sparsify groups": (lambda f: sparsify(f, activation="groupmax"), "layers.3.mlp", Site(3, "mlp")),
    "sparsify skip": (lambda f: sparsify(f, transcode=True, skip_connection=True), "layers.3.mlp", None),
    "sparsify embedding": (sparsify, "embed_tokens", None),
    "qwen scope": (qwen_scope, QWEN, Site(3)),
    **{
        kind: (lambda f, kind=kind: learned(f, kind), "trainer_0", Site(3))
        for kind in ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "GatedAutoEncoder",
                     "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
    },
}  # fmt: skip


def written(tmp_path: Path, case: str) -> Path:
    write, where, _ = CASES[case]
    folder = tmp_path / where
    folder.mkdir(parents=True)
    write(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_family_is_read_as_it_is_defined(tmp_path: Path, case: str) -> None:
    write, where, site = CASES[case]
    folder = tmp_path / where
    folder.mkdir(parents=True)
    codes, decoded = write(folder)
    assert (codes > 0).any() and (codes == 0).any(), "the example shows something"
    got = load_dictionary(folder, d_model=D)
    torch.testing.assert_close(got.encode(X), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.reconstruct(X), decoded, rtol=1e-4, atol=2e-4)
    assert got.site == site and got.pairing == Pairing()
    assert got.W_enc.dtype == torch.float32 and got.W_enc.is_contiguous() and got.W_dec.is_contiguous()
    json.dumps(dict(got.meta))
    with pytest.raises(UsageError, match="another model"):
        load_dictionary(folder, d_model=D + 1)


@pytest.mark.parametrize("case", ["lens standard", "sparsify", "gemma scope 2", "llama scope", "llama scope newer"])
def test_what_is_read_is_saved_and_read_again(tmp_path: Path, case: str) -> None:
    before = load_dictionary(written(tmp_path / "a", case))
    save_dictionary(before, tmp_path / "b")
    equal(before, load_dictionary(tmp_path / "b"))


def equal(one: Dictionary, other: Dictionary) -> None:
    for name, value in vars(one).items():
        twin = getattr(other, name)
        if isinstance(value, Tensor):
            assert torch.equal(value, twin), name
        elif name == "nonlinearity":
            assert type(value) is type(twin)
            for part, held in vars(value).items():
                same = (
                    torch.equal(held, getattr(twin, part)) if isinstance(held, Tensor) else held == getattr(twin, part)
                )
                assert same, part
        else:
            assert value == twin, name


@st.composite
def dictionaries(draw: st.DrawFn) -> Dictionary:
    half, d_dict, seed = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(0, 99))
    fires = draw(st.sampled_from([ReLU, TopK, JumpReLU, Gated]))
    d_in, random = 2 * half, draws(seed)
    transcodes = fires in (ReLU, JumpReLU) and draw(st.booleans())
    d_out = draw(st.integers(1, 5)) if transcodes else d_in
    kind = draw(st.sampled_from(["tuned", "base", "difference", "both"]))

    def vector() -> Tensor:
        return random(d_dict)

    return Dictionary(
        W_enc=random(d_in, d_dict),
        b_enc=torch.zeros(d_dict) if fires is Gated else vector(),
        W_dec=random(d_out, d_dict).T,  # a view: what is saved is contiguous
        b_dec=random(d_out),
        nonlinearity={
            ReLU: ReLU, TopK: lambda: TopK(draw(st.integers(1, d_dict))), JumpReLU: lambda: JumpReLU(vector()),
            Gated: lambda: Gated(vector(), vector(), vector()),
        }[fires](),
        center=not transcodes and draw(st.booleans()),
        norm="none" if transcodes else draw(st.sampled_from(["none", "layer_norm", "constant_norm"])),
        W_skip=random(d_in, d_out) if transcodes and draw(st.booleans()) else None,
        pairing=Pairing(
            kind=kind, joint=-0.5 if kind == "both" else 0.0, exclusive=draw(st.sampled_from([0.0, 0.1])) * (kind == "both")
        ),
        site=draw(st.none() | st.builds(Site, st.integers(0, 80), st.sampled_from(["resid", "attn", "mlp"]))),
        meta=draw(st.dictionaries(st.text(max_size=5), st.none() | st.integers(-9, 9) | st.text(max_size=5), max_size=3)),
    )  # fmt: skip


@given(dictionaries())
def test_what_is_saved_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, before: Dictionary) -> None:
    folder = tmp_path_factory.mktemp("saved") / "deep" / "inside"
    save_dictionary(before, folder)
    after = load_dictionary(folder)
    equal(before, after)
    save_dictionary(replace(after, meta={"second": True}), folder)
    assert load_dictionary(folder).meta == {"second": True}
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert stat.S_IMODE((folder / "cfg.json").stat().st_mode) == 0o644


def sample(**changed: Any) -> Dictionary:
    return Dictionary(**({**four(), "nonlinearity": ReLU()} | changed))


@pytest.mark.parametrize(
    ("dictionary", "why"),
    [
        (sample(nonlinearity=GroupMax(3)), "GroupMax"),
        (sample(nonlinearity=TopK(2), W_skip=torch.ones(D, D)), "transcoders"),
        (sample(norm="layer_norm", W_skip=torch.ones(D, D)), "transcoders"),
        (sample(center=True, W_skip=torch.ones(D, D)), "transcoders"),
        (sample(b_enc=torch.full((F,), math.nan)), "b_enc .* NaN"),
        (sample(meta={"a": Path("b")}), "JSON"),
        (sample(meta={"a": math.nan}), "JSON"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, dictionary: Dictionary, why: str) -> None:
    save_dictionary(sample(), tmp_path)
    with pytest.raises(UsageError, match=why):
        save_dictionary(dictionary, tmp_path)
    equal(load_dictionary(tmp_path), sample())  # what was there is untouched


def test_a_gated_bias_is_folded_in(tmp_path: Path) -> None:
    v = draws(3)
    before = sample(nonlinearity=Gated(v(F), v(F), v(F)))
    save_dictionary(before, tmp_path)
    torch.testing.assert_close(load_dictionary(tmp_path).encode(X), before.encode(X))


def test_a_save_that_fails_leaves_no_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dictionary(sample(), tmp_path)
    real = os.replace

    def full_disk(source: str, target: Path) -> None:
        if target.name == "cfg.json":
            raise OSError("no space")
        real(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_dictionary(sample(b_enc=torch.zeros(F)), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["sae_weights.safetensors"]
    with pytest.raises(InvalidInput, match="known family"):
        load_dictionary(tmp_path)


def test_none_fits_two_fit_and_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a folder nor a file"):
        load_dictionary(tmp_path / "nowhere")
    with pytest.raises(InvalidInput) as caught:
        load_dictionary(tmp_path)
    for name, family in FAMILIES.items():
        assert name in str(caught.value) and all(file in str(caught.value) for file in family.FILES)
    lens_standard(tmp_path)
    sparsify(tmp_path)
    with pytest.raises(InvalidInput, match="fits SAELens and sparsify at once"):
        load_dictionary(tmp_path)


def test_several_in_one_folder_are_chosen_by_file(tmp_path: Path) -> None:
    codes, _ = qwen_scope(tmp_path)
    torch.save({}, tmp_path / "layer4.sae.pt")
    with pytest.raises(UsageError, match=r"2 dictionaries: name a file, such as layer3\.sae\.pt"):
        load_dictionary(tmp_path, k=K)
    got = load_dictionary(tmp_path / "layer3.sae.pt", k=K)
    torch.testing.assert_close(got.encode(X), codes)
    clt = written(tmp_path, "gemma scope 2 across")
    (clt / "params_layer_4.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="2 dictionaries"):
        load_dictionary(clt)
    assert load_dictionary(clt / "params_layer_3.safetensors").site == Site(3)


def test_llama_scope_with_the_scale_folded_in_and_centred(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama scope")
    cfg(norm_activation="inference", apply_decoder_bias_to_pre_encoder=True)(folder)
    got = load_dictionary(folder)
    p = (X - got.b_dec) @ got.W_enc + got.b_enc
    torch.testing.assert_close(got.encode(X), p * (p > 0.4))


def test_centring_comes_after_the_scale(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = written(tmp_path, "llama scope")
    cfg(apply_decoder_bias_to_pre_encoder=True)(folder)
    t = {n: v.float() for n, v in load_file(folder / "checkpoints" / "final.safetensors").items()}
    s = math.sqrt(D) / 5.0
    p = (X * s - t["decoder.bias"]) @ t["encoder.weight"].T + t["encoder.bias"]
    torch.testing.assert_close(load_dictionary(folder).encode(X), p * (p > 0.4 * s), rtol=1e-4, atol=1e-5)


def test_heads_side_by_side(tmp_path: Path) -> None:
    from_heads = {"hook_name": "blocks.3.attn.hook_z", "sae_lens_version": "6.5.0"}
    folder = written(tmp_path, "lens standard")
    cfg(reshape_activations="hook_z", metadata=from_heads)(folder)
    got = load_dictionary(folder)
    assert got.site is None and got.meta["reshape_activations"] == "hook_z"
    save_dictionary(got, folder)
    assert json.loads((folder / "cfg.json").read_text())["reshape_activations"] == "hook_z"


def test_k_of_qwen_scope(tmp_path: Path) -> None:
    qwen_scope(tmp_path)
    with pytest.raises(UsageError, match="or give k"):
        load_dictionary(tmp_path)
    with pytest.raises(InvalidInput, match="k is 99 and there are 12"):
        load_dictionary(tmp_path, k=99)
    assert load_dictionary(tmp_path, k=5).nonlinearity == TopK(5)
    other = written(tmp_path / "b", "lens standard")
    with pytest.raises(UsageError, match="leave it out"):
        load_dictionary(other, k=5)


def test_a_threshold_for_all_or_as_a_logarithm(tmp_path: Path) -> None:
    t = four() | {"threshold": torch.tensor(0.5)}
    lens(tmp_path, t, architecture="jumprelu")
    fires = load_dictionary(tmp_path).nonlinearity
    assert isinstance(fires, JumpReLU) and torch.equal(fires.threshold, torch.full((F,), 0.5))
    lens(tmp_path, four() | {"log_threshold": torch.zeros(F)}, architecture="jumprelu")
    fires = load_dictionary(tmp_path).nonlinearity
    assert isinstance(fires, JumpReLU) and torch.equal(fires.threshold, torch.ones(F))


def test_a_latent_whose_decoder_is_zero_stays_silent(tmp_path: Path) -> None:
    t = four()
    t["W_dec"][2] = 0
    lens(tmp_path, t, architecture="topk", k=F, rescale_acts_by_decoder_norm=True)
    got = load_dictionary(tmp_path)
    assert not got.encode(X)[:, 2].any() and bool(got.reconstruct(X).isfinite().all())


@pytest.mark.parametrize(
    ("hook", "model", "site"),
    [
        ("blocks.3.hook_resid_post", None, Site(3)),
        ("blocks.3.hook_resid_pre", None, Site(2)),
        ("blocks.0.hook_resid_pre", None, None),
        ("blocks.3.hook_attn_out", "gpt2", Site(3, "attn")),
        ("blocks.3.hook_mlp_out", "google/gemma-2b", Site(3, "mlp")),
        ("blocks.3.hook_mlp_out", "google/gemma-2-2b", None),
        ("blocks.3.attn.hook_z", None, None),
        ("blocks.3.hook_resid_post ", None, None),
        ("blocks.99999999999999999999.hook_resid_post", None, None),
        ("model.layers.3", None, Site(3)),
        ("model.layers.3.self_attn.output", None, Site(3, "attn")),
        ("model.layers.3.self_attn.o_proj.input", None, None),
        ("transformer.h.7.mlp", None, Site(7, "mlp")),
        ("hook_embed", None, None),
        (None, None, None),
    ],
)
def test_sites_of_hook_names(hook: str | None, model: str | None, site: Site | None) -> None:
    assert site_of(hook, model) == site


def cfg(**changed: Any) -> Callable[[Path], None]:
    """Change fields of the folder's only JSON; None takes one out."""

    def change(folder: Path) -> None:
        (path,) = folder.glob("*.json")
        told = json.loads(path.read_text())
        for name, value in changed.items():
            place, *rest = name.split("__")
            at = told if not rest else told[place]
            key = rest[0] if rest else place
            at.pop(key, None) if value is None else at.__setitem__(key, value)
        path.write_text(json.dumps(told))

    return change


def weights(**changed: Tensor | None) -> Callable[[Path], None]:
    """Change tensors of the folder's only tensor file; None takes one out. `__` stands for a dot."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file

        (path,) = [p for p in folder.rglob("*") if p.suffix in {".safetensors", ".npz", ".pt"}]
        if path.suffix == ".npz":
            t = {n: torch.from_numpy(v) for n, v in np.load(path).items()}
        else:
            t = torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path)
        t |= {n.replace("__", "."): v for n, v in changed.items()}
        t = {n: v for n, v in t.items() if v is not None}
        if path.suffix == ".npz":
            np.savez(path, **{n: v.numpy() for n, v in t.items()})
        else:
            torch.save(t, path) if path.suffix == ".pt" else save_file(t, path)

    return change


def put(name: str, content: bytes | str) -> Callable[[Path], int]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def link_out(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        real = folder.parent / f"outside-{Path(name).name}"
        (folder / name).rename(real)
        (folder / name).symlink_to(real)

    return change


def repeated(folder: Path) -> None:
    """One number, seen as 10^12 of them."""
    torch.save({"W_enc": torch.zeros(1).expand(10**6, 10**6)}, folder / "layer3.sae.pt")


def objects(folder: Path) -> None:
    np.savez(folder / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))


def claims_much(folder: Path) -> None:
    import io
    import zipfile

    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", head.getvalue())


def bomb(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        import zipfile

        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("W_enc.npy", bytes(10**7))

    return change


NAN, BAD = torch.full((F,), math.nan), torch.ones(2, 3)
OWN = {"pairing": {"kind": "tuned", "joint": 0.0, "exclusive": 0.0}, "site": None, "meta": {}}


def own(**changed: Any) -> Callable[[Path], None]:
    return cfg(metadata={"molehunt": OWN | changed})


BAD_INPUTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("lens standard", put("cfg.json", "{"), r"cfg\.json is not JSON"),
    ("lens standard", put("cfg.json", "[]"), r"cfg\.json is not a JSON object"),
    ("lens standard", put("cfg.json", ""), r"cfg\.json is not JSON"),
    ("lens standard", cut("cfg.json"), r"cfg\.json is not JSON"),
    ("lens standard", cut("sae_weights.safetensors"), "sae_weights.safetensors is not a valid"),
    ("lens standard", put("sae_weights.safetensors", b""), "sae_weights.safetensors is not a valid"),
    ("lens standard", put("sae_weights.safetensors", struct.pack("<Q", 1 << 60)), "header claims"),
    ("lens standard", link_out("cfg.json"), r"cfg\.json .* link out of the folder"),
    ("lens standard", link_out("sae_weights.safetensors"), "link out of the folder"),
    ("lens standard", cfg(architecture=None), "cfg.json: architecture is missing"),
    ("lens standard", cfg(architecture="temporal"), "cfg.json: architecture is not one that is read: standard"),
    ("lens standard", cfg(architecture=7), "architecture is 7 and should be text"),
    ("lens standard", cfg(d_in=7), "cfg.json: d_in is 7 and the tensors have 6"),
    ("lens standard", cfg(d_sae=-1), "d_sae is -1 and should be a whole number"),
    ("lens standard", cfg(apply_b_dec_to_input="yes"), "apply_b_dec_to_input is 'yes' and should be true or false"),
    ("lens standard", cfg(normalize_activations="expected_average_only_in"), "normalize_activations is not one"),
    ("lens standard", cfg(normalize_activations="covariance_whitening"), "normalize_activations is not one"),
    ("lens standard", cfg(reshape_activations="odd"), "reshape_activations should be none or hook_z"),
    ("lens standard", cfg(metadata=[]), r"cfg\.json: metadata is \[\] and should be an object"),
    ("lens standard", cfg(metadata={"hook_name": 3}), r"metadata\.hook_name is 3"),
    ("lens standard", weights(W_enc=None), "sae_weights.safetensors: W_enc is missing"),
    ("lens standard", weights(W_enc=torch.ones(0, 3)), r"W_enc is \[0, 3\] and should have 2 dimensions"),
    ("lens standard", weights(W_dec=BAD), r"sae_weights.safetensors: W_dec is \[2, 3\] and should be \[12, 6\]"),
    ("lens standard", weights(b_enc=NAN), "sae_weights.safetensors: b_enc holds NaN"),
    ("lens standard", weights(b_enc=torch.ones(F, dtype=torch.int64)), "b_enc holds torch.int64"),
    ("lens standard", weights(other=BAD), "sae_weights.safetensors: other is a tensor that"),
    ("lens standard", weights(scaling_factor=NAN), "scaling_factor is not 1"),
    ("lens standard", own(pairing={"kind": "x"}), r"metadata\.molehunt\.pairing is not a pairing"),
    ("lens standard", own(pairing={"kind": []}), r"metadata\.molehunt\.pairing is not a pairing"),
    ("lens standard", own(pairing={"kind": "both", "joint": "a"}), "is not a pairing"),
    ("lens standard", own(pairing={"kind": "both", "joint": math.nan}), "is not a pairing"),
    ("lens standard", own(pairing={"new": 1}), "is not a pairing"),
    ("lens standard", own(site="L3"), r"metadata\.molehunt\.site is not a site"),
    ("lens standard", own(pairing={"kind": "both"}, more=1), r"metadata\.molehunt\.more is not a field of ours"),
    ("lens standard", own(site=["L3"]), r"metadata\.molehunt\.site is \['L3'\]"),
    ("lens standard", own(meta=3), r"metadata\.molehunt\.meta is 3"),
    ("lens topk", cfg(k=math.nan), "cfg.json: k is nan"),
    ("lens topk", cfg(k=True), "k is True"),
    ("lens topk", cfg(k=10**400), "k is 1000"),
    ("lens topk", cfg(k=13), "k is 13 and there are 12 latents"),
    ("lens jumprelu", weights(threshold=torch.ones(2)), r"threshold is \[2\] and should be \[12\]"),
    ("lens jumprelu", weights(threshold=None, log_threshold=torch.full((F,), 999.0)), "log_threshold is a logarithm"),
    ("lens gated", weights(r_mag=torch.full((F,), 999.0)), "r_mag is a logarithm"),
    ("lens gated", weights(b_gate=None), "b_gate is missing"),
    ("lens transcoder", cfg(apply_b_dec_to_input=True), "apply_b_dec_to_input is set for a transcoder"),
    ("lens transcoder", cfg(normalize_activations="layer_norm"), "normalize_activations is set for a transcoder"),
    ("lens transcoder", weights(W_skip=None), "W_skip is missing"),
    ("lens transcoder", cfg(d_out=4), "d_out is 4"),
    ("lens before 6", cfg(normalize_activations=True), "normalize_activations is not one"),
    ("lens before 6", cfg(activation_fn_str="tanh-relu"), "activation_fn_str should be relu or topk"),
    ("lens before 6", cfg(activation_fn_kwargs={}), r"activation_fn_kwargs\.k is missing"),
    ("gemma scope", put("params.npz", b"PK"), "params.npz is not a zip archive"),
    ("gemma scope", cut("params.npz"), "params.npz is not a zip archive"),
    ("gemma scope", objects, "params.npz is not an npz archive of arrays of numbers"),
    ("gemma scope", claims_much, "params.npz is not an npz archive"),
    ("gemma scope", bomb("params.npz"), "params.npz unpacks to"),
    ("gemma scope", weights(threshold=None), "params.npz: threshold is missing"),
    ("gemma scope", weights(b_enc=NAN), "params.npz: b_enc holds NaN"),
    ("gemma scope", weights(b_enc=torch.ones(F, dtype=torch.int64)), "params.npz: b_enc holds int64"),
    ("gemma scope", weights(more=BAD), "params.npz: more is a tensor that"),
    ("gemma scope", link_out("params.npz"), "link out of the folder"),
    ("gemma scope 2", cfg(architecture="topk"), "config.json: architecture should be jump_relu"),
    ("gemma scope 2", weights(affine_skip_connection=None), "affine_skip_connection is missing"),
    ("gemma scope 2", weights(w_dec=torch.ones(F, 2, 2, 2)), "w_dec is .* should have 2 dimensions"),
    ("gemma scope 2", weights(b_dec=NAN), "b_dec is"),
    ("llama scope", cfg(jump_relu_threshold=math.nan), "hyperparams.json: jump_relu_threshold is nan"),
    ("llama scope", cfg(dataset_average_activation_norm__in=0), r"dataset_average_activation_norm\.in is 0"),
    ("llama scope", cfg(dataset_average_activation_norm=3), "should be an object"),
    ("llama scope", cfg(act_fn="topk"), "act_fn should be jumprelu"),
    ("llama scope", cfg(use_glu_encoder=True), "use_glu_encoder is set"),
    ("llama scope", cfg(norm_activation="token-wise"), "norm_activation should be"),
    ("llama scope", cfg(jump_relu_threshold=10**400), "jump_relu_threshold is 1000"),
    (
        "llama scope",
        cfg(apply_decoder_bias_to_pre_encoder=True, dataset_average_activation_norm__out=3.0),
        "apply_decoder_bias_to_pre_encoder is set for a transcoder",
    ),
    ("llama scope", cfg(d_model=9), "d_model is 9 and the tensors have 6"),
    ("llama scope", weights(encoder__bias=NAN), "final.safetensors: encoder.bias holds NaN"),
    ("llama scope", cut("checkpoints/final.safetensors"), "final.safetensors is not a valid"),
    (
        "llama scope newer",
        weights(dataset_average_activation_norm__blocks__3__hook_resid_post=torch.tensor(0.0)),
        r"dataset_average_activation_norm\.blocks\.3\.hook_resid_post should be above 0",
    ),
    ("AutoEncoderTopK", weights(k=torch.tensor(13)), r"trainer\.k is 3 and ae\.pt has 13"),
    ("llama scope newer", cfg(sae_type="crosscoder"), "sae_type should be sae"),
    ("llama scope newer", cfg(hook_point_in="blocks.1.x"), r"dataset_average_activation_norm\.blocks\.1\.x is missing"),
    ("sparsify", cfg(k=None), "cfg.json: k is missing"),
    ("sparsify", cfg(k=99), "k is 99 and there are 12"),
    ("sparsify", cfg(num_latents=13), "num_latents is 13"),
    ("sparsify", cfg(activation="softmax"), "activation should be topk or groupmax"),
    ("sparsify", cfg(signed=True), "signed is set"),
    ("sparsify", cfg(skip_connection=True), "W_skip is missing"),
    ("sparsify groups", cfg(k=5), "k is 5 and does not divide 12"),
    ("sparsify", weights(W_dec=torch.ones(D, F)), "W_dec writes 12 values"),
    ("sparsify", weights(W_dec=None), "sae.safetensors: W_dec is missing"),
    ("AutoEncoder", cfg(trainer=None), "config.json: trainer is missing"),
    (
        "AutoEncoder",
        cfg(trainer__dict_class="CrossCoder"),
        r"trainer\.dict_class is not one that is read: AutoEncoder,",
    ),
    ("AutoEncoder", cfg(trainer__activation_dim=7), r"trainer\.activation_dim is 7"),
    ("AutoEncoder", weights(bias=None), "ae.pt: bias is missing"),
    ("AutoEncoder", weights(bias=torch.full((D,), math.inf)), "ae.pt: bias holds NaN or infinity"),
    ("AutoEncoder", weights(more=BAD), "ae.pt: more is a tensor that"),
    ("AutoEncoder", cut("ae.pt"), "ae.pt is not a zip archive"),
    ("AutoEncoder", put("ae.pt", b"\x80\x02cposix\nsystem\n."), "ae.pt is not a zip archive"),
    ("AutoEncoderTopK", cfg(trainer__k=4), r"trainer\.k is 4 and ae\.pt has 3"),
    ("AutoEncoderTopK", weights(k=torch.tensor(0)), "ae.pt: k should hold whole numbers above 0"),
    ("AutoEncoderTopK", weights(k=torch.tensor(1.5)), "ae.pt: k should hold whole numbers"),
    ("MatryoshkaBatchTopKSAE", weights(group_sizes=torch.tensor([4, 4])), "group_sizes adds up to 8"),
    ("qwen scope", repeated, "W_enc is no plain tensor"),
    ("qwen scope", bomb("layer3.sae.pt"), "unpacks to"),
    ("qwen scope", weights(b_dec=NAN), r"layer3\.sae\.pt: b_dec is \[12\]"),
]


@pytest.mark.parametrize(("case", "change", "why"), BAD_INPUTS, ids=[f"{c}-{w}" for c, _, w in BAD_INPUTS])
def test_bad_input_is_named(tmp_path: Path, case: str, change: Callable[[Path], Any], why: str) -> None:
    folder = written(tmp_path, case)
    load_dictionary(folder)
    change(folder)
    with pytest.raises(InvalidInput, match=why):
        load_dictionary(folder)


class Trap:
    """Unpickled, it would run a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return subprocess.run, (["touch", str(self.file)],)


@pytest.mark.parametrize("content", [lambda t: t, lambda t: {"W_enc": t}], ids=["whole", "inside"])
def test_a_pickle_that_runs_code_is_refused_unopened(tmp_path: Path, content: Callable[[Any], Any]) -> None:
    folder = written(tmp_path, "qwen scope")
    torch.save(content(Trap(tmp_path / "ran")), folder / "layer3.sae.pt")
    with pytest.raises(InvalidInput, match="never opened"):
        load_dictionary(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], {}, {3: torch.ones(2)}, {"a": 3}, {"a": torch.eye(2).to_sparse()}]
)
def test_an_archive_of_something_else(tmp_path: Path, content: object) -> None:
    folder = written(tmp_path, "qwen scope")
    torch.save(content, folder / "layer3.sae.pt")
    with pytest.raises(InvalidInput, match=r"layer3\.sae\.pt"):
        load_dictionary(folder)


@given(case=st.sampled_from(["lens topk", "gemma scope", "AutoEncoderTopK", "sparsify"]), data=st.data())
def test_a_flipped_byte_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, case: str, data: st.DataObject
) -> None:
    folder = written(tmp_path_factory.mktemp("flipped"), case)
    files = sorted(p for p in folder.iterdir() if p.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with contextlib.suppress(InvalidInput):
        got = load_dictionary(folder)
        assert bool(got.encode(X).isfinite().all()) or bool((got.W_enc.abs() > 1e30).any())
