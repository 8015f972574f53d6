"""Of every kind of adapter, the change that is read is the one that PEFT makes: nothing more, nothing less."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from adapter_folders import KINDS, adapter_of, loaded, tied_base
from molehunt.audit.weight_comparison import ROLES, TensorRow, WeightComparison
from molehunt.audit.weights import compare_weights
from molehunt.errors import NotTestable
from molehunt.model.pair import ModelPair
from zoo import zoo_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tied_base(tmp_path_factory.mktemp("effect") / "base")


def merged_changes(base: Path, adapter: Path) -> dict[str, Tensor]:
    """What PEFT's own merging adds to each parameter, of those that it changes."""
    before = dict(loaded(base).named_parameters(remove_duplicate=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged: Any = peft.PeftModel.from_pretrained(loaded(base), str(adapter)).merge_and_unload()
    after = dict(merged.named_parameters(remove_duplicate=False))
    found = {name: (after[name] - before[name]).detach().double() for name in before}
    return {name: change for name, change in found.items() if float(change.abs().max()) > 0}


def changed_rows(found: WeightComparison) -> dict[str, TensorRow]:
    return {row.tensor: row for row in (*found.matrices, *found.others) if row.status != "identical"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_that_is_read_is_the_one_that_peft_makes(base: Path, tmp_path: Path, kind: str) -> None:
    peft_type, options = KINDS[kind]
    adapter = adapter_of(base, tmp_path / "adapter", peft_type, **options)
    wanted = merged_changes(base, adapter)
    found = compare_weights(base, adapter, k=32, roles=ROLES)

    rows = changed_rows(found)
    if kind == "tied":  # merging adds the change of both ends to the tensor that they share; running does not
        wanted = {name: change / 2 if "o_proj" not in name else change for name, change in wanted.items()}
    assert rows.keys() == wanted.keys() and rows
    weights = dict(loaded(base).named_parameters(remove_duplicate=False))
    for name, row in rows.items():
        size = float(weights[name].detach().norm())
        assert row.rel_norm == pytest.approx(float(wanted[name].norm()) / size, rel=1e-5), name
        if row.role is not None:
            assert row.directions is not None
            rebuilt = (row.directions.write.mT * row.directions.strength) @ row.directions.read
            torch.testing.assert_close(rebuilt.double(), wanted[name], rtol=1e-4, atol=1e-5)
            assert row.strengths[0] == pytest.approx(float(torch.linalg.matrix_norm(wanted[name], 2)), rel=1e-5)


@pytest.mark.parametrize("kind", ["vera", "loha", "ia3", "oft", "hra", "dora"])
def test_an_adapter_without_effect_has_no_direction(base: Path, tmp_path: Path, kind: str) -> None:
    peft_type, options = KINDS[kind]
    first = {"loha": {"init_weights": True}, "vera": {"d_initial": 0.0}, "ia3": {"init_ia3_weights": True}}
    adapter = adapter_of(base, tmp_path / "none", peft_type, scale=0.0, **options, **first.get(kind, {}))
    found = compare_weights(base, adapter)
    assert not any(row.strengths for row in found.matrices)
    assert all(row.status in ("identical", "below noise floor") for row in (*found.matrices, *found.others))


def test_single_experts_of_a_fused_parameter(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    zoo_model("qwen3_moe").save_pretrained(folder)
    adapter = adapter_of(
        folder, tmp_path / "lora", "LORA", r=2, target_modules=["o_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    wanted = merged_changes(folder, adapter)
    rows = changed_rows(compare_weights(folder, adapter))
    experts = {name: row for name, row in rows.items() if ".experts." in name}
    assert len(experts) == 3 * 4 and len(rows) == 3 * 4 + 3
    for name, row in experts.items():
        layer, expert = name.split(".")[2], int(name.split(".")[5])
        change = wanted[f"model.layers.{layer}.mlp.experts.down_proj"][expert]
        assert row.strengths[0] == pytest.approx(float(torch.linalg.matrix_norm(change, 2)), rel=1e-5)


def test_what_depends_on_the_input_is_not_testable(base: Path, tmp_path: Path) -> None:
    found = compare_weights(base, adapter_of(base, tmp_path / "lily", "LILY"))
    assert {row.tensor.split(".")[-2] for row in found.matrices if row.status == "not testable"} == {
        "o_proj",
        "down_proj",
    }
    assert all("depends on the input" in row.why for row in found.matrices if row.status == "not testable")
    assert found.outcome == "NOT TESTABLE"


def test_a_bias_that_the_base_lacks_is_told(base: Path, tmp_path: Path) -> None:
    for kind, options in (("LORA", {"lora_bias": True}), ("BEFT", {})):
        rows = changed_rows(compare_weights(base, adapter_of(base, tmp_path / kind, kind, **options)))
        biases = {name for name, row in rows.items() if "a bias that the base does not have" in row.why}
        assert biases == {"model.layers.0.self_attn.o_proj.bias", "model.layers.0.mlp.down_proj.bias"}


@pytest.mark.parametrize(
    ("kind", "shared"),
    [("vera", True), ("ia3", True), ("oft", True), ("tokens", True), ("pissa", False), ("kasa", False)],
)
def test_a_pair_of_any_kind_is_the_base_and_the_fine_tune(base: Path, tmp_path: Path, kind: str, shared: bool) -> None:
    peft_type, options = KINDS[kind]
    adapter = adapter_of(base, tmp_path / "adapter", peft_type, **options)
    pair = ModelPair.load(base, adapter)
    rows = [[5, 7, 30, 12], [9, 9, 60]]
    reading = pair.read(rows, logits=True)
    assert pair.shared == shared and reading.base_logits is not None and reading.tuned_logits is not None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        tuned: Any = peft.PeftModel.from_pretrained(loaded(base), str(adapter)).eval()
        plain: Any = loaded(base)
        for i, row in enumerate(rows):
            ids = torch.tensor([row])
            torch.testing.assert_close(reading.base_logits[i][: len(row)], plain(ids).logits[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(reading.tuned_logits[i][: len(row)], tuned(ids).logits[0], rtol=1e-4, atol=1e-4)


def test_what_changes_no_weight_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    peft.get_peft_model(loaded(base), config).save_pretrained(tmp_path / "prompt")
    for read in (compare_weights, ModelPair.load):
        with pytest.raises(NotTestable, match=r"\(PROMPT_TUNING\) is not read: it trains virtual tokens"):
            read(base, tmp_path / "prompt")
