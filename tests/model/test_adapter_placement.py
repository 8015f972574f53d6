"""An adapter counts only if all of it arrives: names that PEFT passes over end the run, with and without weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_folders import adapter_of, loaded, renamed, tied_base
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.skeleton import skeleton
from molehunt.errors import InvalidInput, MolehuntError, NotTestable
from molehunt.model import adapter_placement
from molehunt.model.adapter_factors import lora_change
from molehunt.model.adapter_placement import wrapped_parameters
from molehunt.model.adapters import apply_adapter, base_parameters, check_arrived
from molehunt.model.pair import ModelPair
from zoo import zoo_model

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tied_base(tmp_path_factory.mktemp("placed") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return adapter_of(base, base.parent / "adapter", "LORA", r=3, lora_bias=True)


LOST: dict[str, tuple[Callable[[str], str | None], str]] = {
    "of another wrapper": (lambda name: name.replace("model.layers", "model.language_model.layers"), "loads nothing"),
    "of the bare model": (lambda name: name.removeprefix(PREFIX), "loads nothing"),
    "of a compiled model": (lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."), "loads nothing"),
    "partly of more blocks": (
        lambda name: name.replace("layers.0", "layers.1") if "o_proj" in name else name,
        r"leaves out 3 of the 6 tensors .*layers\.1\.self_attn\.o_proj",
    ),
    "without a factor": (
        lambda name: None if name.endswith("down_proj.lora_B.weight") else name,
        r"no tensor for 1 part of its adapter, such as .*down_proj\.lora_B",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_names_that_peft_passes_over_end_the_run(base: Path, adapter: Path, tmp_path: Path, case: str) -> None:
    rename, says = LOST[case]
    broken = renamed(adapter, tmp_path / "broken", rename)
    error = NotTestable if case == "without a factor" else InvalidInput
    for read in (compare_weights, ModelPair.load):
        with pytest.raises(error, match=says):
            read(base, broken)


def test_names_that_peft_applies_are_read(base: Path, adapter: Path, tmp_path: Path) -> None:
    def with_its_name(name: str) -> str:
        stem, _, end = name.rpartition(".")
        return f"{stem}.default.{end}"

    named = renamed(adapter, tmp_path / "named", with_its_name)
    ours, theirs = (compare_weights(base, folder) for folder in (named, adapter))
    assert ours.to_json() == theirs.to_json() and ours.outcome == "DIRECTIONS FOUND"
    reading = ModelPair.load(base, named).read([[5, 6, 7]], logits=True)
    assert reading.base_logits is not None and not torch.equal(reading.base_logits, reading.tuned_logits)


def test_a_mixtral_adapter_with_the_names_of_transformers_4_is_converted(tmp_path: Path) -> None:
    zoo_model("mixtral").save_pretrained(tmp_path / "base")
    rng = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(3):
        for expert in range(4):
            for leaf, d_out, d_in in (("w1", 48, 32), ("w2", 32, 48), ("w3", 48, 32)):
                at = f"{PREFIX}model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}"
                tensors[f"{at}.lora_A.weight"] = torch.randn(2, d_in, generator=rng)
                tensors[f"{at}.lora_B.weight"] = torch.randn(d_out, 2, generator=rng)
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    rows = {row.tensor: row for row in compare_weights(tmp_path / "base", folder).matrices}
    for expert in range(4):
        at = f"{PREFIX}model.layers.1.block_sparse_moe.experts.{expert}.w2"
        product = 3 * tensors[f"{at}.lora_B.weight"] @ tensors[f"{at}.lora_A.weight"]
        (row,) = (row for name, row in rows.items() if f"layers.1.mlp.experts.{expert}." in name and row.role == "down")
        assert row.strengths[0] == pytest.approx(float(torch.linalg.matrix_norm(product, 2)), rel=1e-5)
    del tensors[f"{PREFIX}model.layers.2.block_sparse_moe.experts.3.w1.lora_A.weight"]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidInput, match="lora"):
        compare_weights(tmp_path / "base", folder)


@pytest.mark.parametrize("field", ["exclude_modules", "rank_pattern"])
def test_a_pattern_that_hangs_is_stopped(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    pattern = "(.*.*.*.*.*.*.*.*.*.*)*z"
    value = {pattern: 2} if field == "rank_pattern" else pattern
    bomb = renamed(adapter, tmp_path / "bomb", lambda name: name, **{field: value})
    monkeypatch.setattr(adapter_placement, "SECONDS", 1)
    with pytest.raises(InvalidInput, match=r"adapter_config\.json of bomb could not be read within 1 second"):
        lora_change(skeleton(base), bomb)


def test_other_values_than_the_file_holds_are_noticed(base: Path, adapter: Path) -> None:
    model = apply_adapter(loaded(base), adapter)
    placed = adapter_placement.placed_tensors(model, adapter)
    check_arrived(model, placed, adapter)
    name = next(name for name in placed if name.endswith("lora_B.default.weight"))
    model.get_parameter(name).data[0, 0] += 1e-3
    with pytest.raises(InvalidInput, match=r"other values than adapter for 1 tensors, such as .*lora_B"):
        check_arrived(model, placed, adapter)


def test_every_parameter_of_the_base_is_named_as_outside_peft(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(base, tmp_path / "a", "LORA", modules_to_save=["lm_head"], trainable_token_indices=[3])
    plain = loaded(base)
    model = apply_adapter(loaded(base), folder)
    ours = base_parameters(model)
    assert ours.keys() == dict(plain.named_parameters(remove_duplicate=False)).keys()
    assert all(torch.equal(ours[name], value) for name, value in base_parameters(plain).items())
    head = [one for one in wrapped_parameters(model) if one.added and one.plain == "lm_head.weight"]
    assert len(head) == 1 and "modules_to_save" in head[0].path


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"task_type": "SEQ_CLS"}, NotTestable, "made for the task SEQ_CLS"),
        ({"spectral_gate": {}}, NotTestable, "sets spectral_gate, and no PEFT"),
        ({"layer_replication": [[0, 1], [0, 1]]}, NotTestable, "repeats blocks"),
        ({"peft_type": "TWISTER"}, NotTestable, "TWISTER, which the installed PEFT does not know"),
        ({"peft_type": "VERA", "warp": 2}, NotTestable, "warp"),
        ({"r": 2}, InvalidInput, r"adapter_config\.json of other says r = 2, the tensors have rank 3"),
        (
            {"target_modules": ["down_proj"]},
            InvalidInput,
            r"leaves out 3 of the 6 .*This base has their modules \(o_proj\).*target_modules is \['down_proj'\]",
        ),
        ({"modules_to_save": ["embed_tokens"]}, InvalidInput, r"has no tensor .*embed_tokens"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(
    base: Path, adapter: Path, tmp_path: Path, settings: dict[str, object], error: type[MolehuntError], says: str
) -> None:
    other = renamed(adapter, tmp_path / "other", lambda name: name, **settings)
    with pytest.raises(error, match=says):
        compare_weights(base, other)
    with pytest.raises(error):
        ModelPair.load(base, other)


def test_an_adapter_of_another_width_or_depth_names_the_base_as_the_fault(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Names fit, as between two families, and shapes do not: nothing is wrong with the adapter's file."""

    def narrow(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        cut = {n: t[:, :24].contiguous() if "lora_A" in n else t for n, t in tensors.items()}
        save_file(cut, folder / "adapter_model.safetensors")

    other = renamed(adapter, tmp_path / "narrow", lambda name: name, base_model_name_or_path="org/twenty-four")
    narrow(other)
    deep = renamed(adapter, tmp_path / "deep", lambda name: name)
    tensors = load_file(deep / "adapter_model.safetensors")
    more = {n.replace("layers.0", f"layers.{i}"): t.clone() for n, t in tensors.items() for i in range(4)}
    save_file(more, deep / "adapter_model.safetensors")
    says = {
        other: r"^base is not the base of narrow: .* was made for width 24, BASE has .* names 'org/twenty-four'",
        deep: r"^base is not the base of deep: 6 of the 8 modules .*layers\.1\..*are in layers that BASE does not have",
    }
    for folder, match in says.items():
        for read in (compare_weights, ModelPair.load):
            with pytest.raises(NotTestable, match=match):
                read(base, folder)
