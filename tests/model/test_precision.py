"""Large models that are stored in bf16 run in it where the CPU can; nothing else does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from folders import edit_json, good_folder, lora_folder
from molehunt.model import precision
from molehunt.model.pair import ModelPair
from molehunt.model.precision import running_dtype

CPU = torch.device("cpu")


def stored_in(folder: Path, dtype: torch.dtype, *, but: str = "") -> Path:
    """The folder with all tensors in one data type, except those with `but` in their name."""
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: value if but and but in name else value.to(dtype) for name, value in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    edit_json(folder / "config.json", dtype=str(dtype).removeprefix("torch."))
    return folder


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bf16, and models of any size that are large enough."""
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(precision, "LARGE", 1)


def test_bf16_is_for_pairs_whose_matrices_are_all_stored_in_it(tmp_path: Path, able: None) -> None:
    base, tuned = (stored_in(good_folder(tmp_path / name, seed=n), torch.bfloat16) for n, name in enumerate("ab"))
    assert running_dtype(base, tuned, CPU) == torch.bfloat16
    whole = stored_in(good_folder(tmp_path / "c", seed=1), torch.float32)
    one = stored_in(good_folder(tmp_path / "d", seed=1), torch.bfloat16, but="layers.0.mlp.down_proj")
    half = stored_in(good_folder(tmp_path / "e", seed=1), torch.float16)
    for other in (whole, one, half):
        assert running_dtype(base, other, CPU) == running_dtype(other, base, CPU) == torch.float32
    pair = ModelPair.load(base, tuned)
    with pair.tuned_model() as model:
        assert next(model.parameters()).dtype == torch.bfloat16


def test_an_adapter_runs_on_its_base_in_bf16(tmp_path: Path, able: None) -> None:
    adapter = lora_folder(tmp_path / "lora")
    base = stored_in(good_folder(tmp_path / "base"), torch.bfloat16)
    assert running_dtype(base, adapter, CPU) == torch.bfloat16
    base = stored_in(base, torch.float32)
    assert running_dtype(base, adapter, CPU) == torch.float32


def test_small_models_and_other_cpus_stay_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = stored_in(good_folder(tmp_path / "base"), torch.bfloat16)
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: True)
    assert running_dtype(base, base, CPU) == torch.float32, "too small to pay"
    monkeypatch.setattr(precision, "LARGE", 1)
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: False)
    assert running_dtype(base, base, CPU) == torch.float32
    assert running_dtype(base, base, torch.device("meta")) is None, "an accelerator takes each model as it is stored"
