"""Folders of dictionaries as each family writes them, with what its own definition makes of them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from molehunt.site import Site

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
    config = {
        "architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2", "sae_lens_version": "6.5.0"},
    }  # fmt: skip
    write_json(folder / "cfg.json", config | ({} if metadata is None else {"metadata": metadata}) | cfg)
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
    config = {"d_in": D, "k": K, "expansion_factor": 2, "num_latents": 0, "normalize_decoder": True, **cfg}
    t = {"encoder.weight": draw(F, D), "encoder.bias": draw(F), "W_dec": draw(F, D), "b_dec": draw(D)}
    if cfg.get("skip_connection"):
        t["W_skip"] = draw(D, D)
    write_json(folder / "cfg.json", config)
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


def trainer(folder: Path, kind: str, t: dict[str, Tensor], **options: Any) -> None:
    write_json(
        folder / "config.json",
        {
            "trainer": {
                "trainer_class": "T", "dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 3,
                "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_3", **options,
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


def cfg(**changed: Any) -> Callable[[Path], None]:
    """Change fields of the folder's only JSON; None takes one out."""

    def change(folder: Path) -> None:
        (path,) = folder.glob("*.json")
        config = json.loads(path.read_text())
        for name, value in changed.items():
            place, *rest = name.split("__")
            at = config if not rest else config[place]
            key = rest[0] if rest else place
            at.pop(key, None) if value is None else at.__setitem__(key, value)
        path.write_text(json.dumps(config))

    return change


def weights(**changed: Tensor | None) -> Callable[[Path], None]:
    """Change tensors of the folder's only tensor file; None takes one out. `__` stands for a dot."""

    def change(folder: Path) -> None:
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
