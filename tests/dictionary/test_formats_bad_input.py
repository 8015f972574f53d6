"""Folders of dictionaries that are broken or hostile: each names its file and field, and nothing runs."""

import contextlib
import io
import math
import os
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dictionary_folders import (
    D,
    F,
    X,
    cfg,
    weights,
    written,
)
from molehunt.dictionary.formats.detect import load_dictionary
from molehunt.errors import InvalidInput


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
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", head.getvalue())


def bomb(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
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
