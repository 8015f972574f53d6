"""Dictionaries that the packages themselves wrote, and ours as they load them. Needs the extra `peers`."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.detect import load_dictionary
from molehunt.dictionary.formats.sae_lens import save_dictionary
from molehunt.dictionary.nonlinearity import GatedActivation, JumpReLUActivation, ReLUActivation, TopKActivation
from molehunt.dictionary.pairing import Pairing
from molehunt.site import Site

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend
D, F = 8, 20
X = torch.randn(40, D, generator=torch.Generator().manual_seed(1)) * 3


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


def randomise(module: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        values = torch.randn_like(parameter) * 0.5
        parameter.data = values.abs() if "threshold" in name else values


SAES: list[tuple[str, dict[str, Any]]] = [
    ("StandardSAE", {}),
    ("StandardSAE", {"normalize_activations": "layer_norm"}),
    ("StandardSAE", {"normalize_activations": "constant_norm_rescale", "apply_b_dec_to_input": False}),
    ("TopKSAE", {"k": 4}),
    ("TopKSAE", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    ("JumpReLUSAE", {"apply_b_dec_to_input": False}),
    ("GatedSAE", {}),
    ("Transcoder", {"apply_b_dec_to_input": False, "d_out": 5}),
    ("SkipTranscoder", {"apply_b_dec_to_input": False, "d_out": 5}),
    ("JumpReLUTranscoder", {"apply_b_dec_to_input": False, "d_out": 5}),
    ("JumpReLUSkipTranscoder", {"apply_b_dec_to_input": False, "d_out": 5}),
]


@pytest.mark.parametrize(("kind", "settings"), SAES)
def test_sae_lens_writes_and_we_read(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    lens = pytest.importorskip("sae_lens")
    config = getattr(lens, f"{kind}Config")(d_in=D, d_sae=F, **settings)
    config.metadata.hook_name = "blocks.3.hook_resid_post"
    theirs = getattr(lens, kind)(config)
    randomise(theirs)
    theirs.save_model(tmp_path)
    ours = load_dictionary(tmp_path)
    with torch.no_grad():
        close(ours.encode(X), theirs.encode(X))
        close(ours.reconstruct(X), theirs(X))
    assert ours.site == Site(3)
    save_dictionary(ours, tmp_path / "again")
    with torch.no_grad():
        close(lens.SAE.load_from_disk(tmp_path / "again")(X), ours.reconstruct(X))


@pytest.mark.parametrize(
    ("kind", "settings"), [("BatchTopK", {"k": 4}), ("MatryoshkaBatchTopK", {"k": 4, "matryoshka_widths": [5, F]})]
)
def test_what_sae_lens_trains_by_batch_is_read_as_jumprelu(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    lens = pytest.importorskip("sae_lens")
    theirs = getattr(lens, f"{kind}TrainingSAE")(getattr(lens, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=F, **settings))
    randomise(theirs)
    theirs.topk_threshold.fill_(0.8)
    theirs.save_inference_model(tmp_path)
    ours = load_dictionary(tmp_path)
    assert isinstance(ours.nonlinearity, JumpReLUActivation)
    with torch.no_grad():
        close(ours.encode(X), lens.SAE.load_from_disk(tmp_path).encode(X))


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.5


def ours(**changed: Any) -> Dictionary:
    base: dict[str, Any] = {"W_enc": values(D, F), "b_enc": values(F), "W_dec": values(F, D), "b_dec": values(D)}
    return Dictionary(
        **{**base, "nonlinearity": ReLUActivation(), "center": True, "site": Site(3), "meta": {"seed": 1}, **changed}
    )


OURS = [
    ours(),
    ours(norm="layer_norm"),
    ours(norm="constant_norm", center=False),
    ours(nonlinearity=TopKActivation(5)),
    ours(nonlinearity=JumpReLUActivation(values(F).abs())),
    ours(nonlinearity=GatedActivation(values(F), values(F), values(F)), b_enc=torch.zeros(F)),
    ours(center=False, W_skip=values(D, 3), W_dec=values(F, 3), b_dec=values(3)),
    ours(center=False, nonlinearity=JumpReLUActivation(values(F)), W_dec=values(F, 3), b_dec=values(3)),
    ours(pairing=Pairing(kind="difference"), nonlinearity=TopKActivation(5)),
    ours(pairing=Pairing(kind="both", joint=-0.5, exclusive=0.1)),
]


@pytest.mark.parametrize("before", OURS)
def test_we_write_and_sae_lens_reads(tmp_path: Path, before: Dictionary) -> None:
    lens = pytest.importorskip("sae_lens")
    save_dictionary(before, tmp_path)
    theirs = lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        close(theirs.encode(X), before.encode(X))
        close(theirs(X), before.reconstruct(X))
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    theirs.save_model(tmp_path / "theirs")  # our own facts survive their save
    after = load_dictionary(tmp_path / "theirs")
    assert (after.pairing, after.site, after.meta) == (before.pairing, before.site, before.meta)
    assert torch.equal(after.encode(X), before.encode(X))


def fetched_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's loaders, which only know the hub, given a folder."""
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")

    def local(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        return str(folder / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    return loaders


def lens_of(loaders: Any, loaded: tuple[dict[str, Any], dict[str, Tensor], Any], scale: float | None = None) -> Any:
    from sae_lens import SAE

    cfg = loaders.handle_config_defaulting(loaded[0] | {"dtype": "float32"})
    kind = SAE.get_sae_config_class_for_architecture(cfg["architecture"])
    sae = SAE.get_sae_class_for_architecture(cfg["architecture"])(kind.from_dict(cfg))
    sae.load_state_dict({name: value.float() for name, value in loaded[1].items()})
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
    return sae


def test_llama_scope_as_sae_lens_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With decoders of length 1, where its reader and the authors' code agree."""
    loaders = fetched_from(tmp_path, monkeypatch)
    decoder = torch.nn.functional.normalize(values(D, F), dim=0)
    folder = tmp_path / "L3"
    (folder / "checkpoints").mkdir(parents=True)
    save_file(
        {
            "encoder.weight": values(F, D),
            "encoder.bias": values(F),
            "decoder.weight": decoder,
            "decoder.bias": values(D),
        },
        folder / "checkpoints" / "final.safetensors",
    )
    hook = "blocks.3.hook_resid_post"
    config = {
        "d_model": D, "d_sae": F, "jump_relu_threshold": 0.5, "hook_point_in": hook, "hook_point_out": hook,
        "dataset_average_activation_norm": {"in": 4.0, "out": 4.0}, "sparsity_include_decoder_norm": True,
    }  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(config))
    loaded = loaders.llama_scope_sae_huggingface_loader("r", "L3", cfg_overrides={"dtype": "float32"})
    theirs, got = lens_of(loaders, loaded, math.sqrt(D) / 4.0), load_dictionary(folder)
    with torch.no_grad():
        close(got.encode(X), theirs.encode(X))
        close(got.reconstruct(X), theirs(X))


def test_gemma_scope_2_as_sae_lens_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = fetched_from(tmp_path, monkeypatch)
    where = "transcoder_all/layer_3_width_16k_l0_small_affine"
    folder = tmp_path / where
    folder.mkdir(parents=True)
    tensors = {
        "w_enc": values(D, F), "w_dec": values(F, D), "b_enc": values(F), "b_dec": values(D),
        "threshold": values(F).abs(), "affine_skip_connection": values(D, D),
    }  # fmt: skip
    save_file(tensors, folder / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": True}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    theirs, got = lens_of(loaders, loaders.gemma_3_sae_huggingface_loader("r", where)), load_dictionary(folder)
    with torch.no_grad():
        close(got.encode(X), theirs.encode(X))
        close(got.reconstruct(X), theirs(X))


def test_gemma_scope_as_sae_lens_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    loaders = fetched_from(tmp_path, monkeypatch)
    where = "layer_3/width_16k/average_l0_82"
    folder = tmp_path / "gemma-scope-2b-pt-res" / where
    folder.mkdir(parents=True)
    tensors = {"W_enc": values(D, F), "W_dec": values(F, D), "b_enc": values(F), "b_dec": values(D)}
    np.savez(folder / "params.npz", threshold=values(F).abs().numpy(), **{n: t.numpy() for n, t in tensors.items()})
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **_: str(folder / "params.npz"))
    size = {"d_in": D, "d_sae": F}
    loaded = loaders.gemma_2_sae_huggingface_loader("google/gemma-scope-2b-pt-res", where, cfg_overrides=size)
    theirs, got = lens_of(loaders, (loaded[0] | size, *loaded[1:])), load_dictionary(folder)
    with torch.no_grad():
        close(got.encode(X), theirs.encode(X))
        close(got.reconstruct(X), theirs(X))
    assert got.site == Site(3)


def test_qwen_scope_as_sae_lens_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_4"
    folder = tmp_path / release
    folder.mkdir()
    loaders = fetched_from(folder, monkeypatch)
    tensors = {"W_enc": values(F, D), "W_dec": values(D, F), "b_enc": values(F), "b_dec": values(D)}
    torch.save(tensors, folder / "layer3.sae.pt")
    size = {"d_in": D, "d_sae": F}
    loaded = loaders.qwen_scope_sae_huggingface_loader(f"Qwen/{release}", "layer3.sae.pt", cfg_overrides=size)
    theirs, got = lens_of(loaders, loaded), load_dictionary(folder)
    with torch.no_grad():
        close(got.encode(X), theirs.encode(X))
        close(got.reconstruct(X), theirs(X))


def learners() -> dict[str, Callable[[Any], torch.nn.Module]]:
    return {
        "AutoEncoder": lambda m: m.AutoEncoder(D, F),
        "AutoEncoderNew": lambda m: m.AutoEncoderNew(D, F),
        "GatedAutoEncoder": lambda m: m.GatedAutoEncoder(D, F),
        "JumpReluAutoEncoder": lambda m: m.JumpReluAutoEncoder(D, F),
        "AutoEncoderTopK": lambda m: m.AutoEncoderTopK(D, F, 4),
        "BatchTopKSAE": lambda m: m.BatchTopKSAE(D, F, 4),
        "MatryoshkaBatchTopKSAE": lambda m: m.MatryoshkaBatchTopKSAE(D, F, 4, [5, F - 5]),
    }


@pytest.mark.parametrize("kind", learners())
def test_dictionary_learning_writes_and_we_read(tmp_path: Path, kind: str) -> None:
    from types import SimpleNamespace

    package = pytest.importorskip("dictionary_learning.dictionary")
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    classes = {k: v for m in (package, top_k, batch_top_k, matryoshka_batch_top_k) for k, v in vars(m).items()}
    theirs = learners()[kind](SimpleNamespace(**classes))
    randomise(theirs)
    if hasattr(theirs, "group_sizes") or kind == "BatchTopKSAE":
        theirs.threshold.fill_(0.7)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "submodule_name": "resid_post_layer_3"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    got = load_dictionary(tmp_path)
    with torch.no_grad():
        close(got.encode(X), theirs.encode(X))
        close(got.reconstruct(X), theirs(X))
    assert replace(got).site == Site(3)
