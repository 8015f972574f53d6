"""Each family's folder, written by its published definition, against that definition's own formula."""

import json
import math
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dictionary_folders import CASES, D, F, K, X, cfg, draws, four, lens, lens_standard, qwen_scope, sparsify, written
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.formats.detect import dictionary_formats, load_dictionary
from molehunt.dictionary.formats.fields import site_of
from molehunt.dictionary.formats.sae_lens import save_dictionary
from molehunt.dictionary.nonlinearity import (
    GatedActivation,
    GroupMaxActivation,
    JumpReLUActivation,
    ReLUActivation,
    TopKActivation,
)
from molehunt.dictionary.pairing import Pairing
from molehunt.errors import InvalidInput, UsageError
from molehunt.site import Site


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
    fires = draw(st.sampled_from([ReLUActivation, TopKActivation, JumpReLUActivation, GatedActivation]))
    d_in, random = 2 * half, draws(seed)
    transcodes = fires in (ReLUActivation, JumpReLUActivation) and draw(st.booleans())
    d_out = draw(st.integers(1, 5)) if transcodes else d_in
    kind = draw(st.sampled_from(["tuned", "base", "difference", "both"]))

    def vector() -> Tensor:
        return random(d_dict)

    return Dictionary(
        W_enc=random(d_in, d_dict),
        b_enc=torch.zeros(d_dict) if fires is GatedActivation else vector(),
        W_dec=random(d_out, d_dict).T,  # a view: what is saved is contiguous
        b_dec=random(d_out),
        nonlinearity={
            ReLUActivation: ReLUActivation, TopKActivation: lambda: TopKActivation(draw(st.integers(1, d_dict))), JumpReLUActivation: lambda: JumpReLUActivation(vector()),
            GatedActivation: lambda: GatedActivation(vector(), vector(), vector()),
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
    return Dictionary(**({**four(), "nonlinearity": ReLUActivation()} | changed))


@pytest.mark.parametrize(
    ("dictionary", "why"),
    [
        (sample(nonlinearity=GroupMaxActivation(3)), "GroupMax"),
        (sample(nonlinearity=TopKActivation(2), W_skip=torch.ones(D, D)), "transcoders"),
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


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm"])
def test_an_activation_of_zero_is_read_as_one(norm: str) -> None:
    """Its direction is none, so that only biases are left."""
    made, zero = sample(norm=norm, center=False), torch.zeros(1, D)
    torch.testing.assert_close(made.pre_activations(zero)[0], made.b_enc)
    assert torch.isfinite(made.reconstruct(zero)).all()


def test_a_gated_bias_is_folded_in(tmp_path: Path) -> None:
    v = draws(3)
    before = sample(nonlinearity=GatedActivation(v(F), v(F), v(F)))
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
    families = [form.family for form in dictionary_formats()]
    assert families == [
        "SAELens",
        "sparsify",
        "Gemma Scope",
        "Gemma Scope 2",
        "Llama Scope",
        "dictionary_learning",
        "Qwen Scope",
    ]
    for form in dictionary_formats():
        assert all(f"{form.family}: {files}" in str(caught.value) for files in form.wants)
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
    assert load_dictionary(tmp_path, k=5).nonlinearity == TopKActivation(5)
    other = written(tmp_path / "b", "lens standard")
    with pytest.raises(UsageError, match="leave it out"):
        load_dictionary(other, k=5)


def test_a_threshold_for_all_or_as_a_logarithm(tmp_path: Path) -> None:
    t = four() | {"threshold": torch.tensor(0.5)}
    lens(tmp_path, t, architecture="jumprelu")
    fires = load_dictionary(tmp_path).nonlinearity
    assert isinstance(fires, JumpReLUActivation) and torch.equal(fires.threshold, torch.full((F,), 0.5))
    lens(tmp_path, four() | {"log_threshold": torch.zeros(F)}, architecture="jumprelu")
    fires = load_dictionary(tmp_path).nonlinearity
    assert isinstance(fires, JumpReLUActivation) and torch.equal(fires.threshold, torch.ones(F))


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
