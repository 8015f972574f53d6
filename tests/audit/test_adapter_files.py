"""What `files` says of adapters that are incomplete, broken, of another base, or of no effect."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_folders import KINDS, adapter_of, renamed, tied_base
from molehunt.audit.files import FolderComparison, compare_folders
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.settings_diff import setting_differences
from molehunt.errors import InvalidInput

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tied_base(tmp_path_factory.mktemp("adapter-files") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return adapter_of(base, base.parent / "adapter", "LORA", r=3)


def edited(adapter: Path, into: Path, change: Callable[[Tensors], Tensors], **settings: object) -> Path:
    folder = renamed(adapter, into, lambda name: name, **settings)
    tensors = change(load_file(folder / "adapter_model.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def finding(found: FolderComparison) -> str:
    """The one finding's reason."""
    assert (found.verdict, found.exit_code) == ("FLAGGED-CORRELATIONAL", 1)
    (row,) = (row for row in found.rows if row.severity == "finding")
    return row.why


def test_what_an_adapter_changes_is_said_from_its_factors(base: Path, adapter: Path) -> None:
    found = compare_folders(base, adapter)
    assert found.exit_code == 0
    tensors = load_file(adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    stems = [name.removesuffix("lora_A.weight") for name in tensors if name.endswith("lora_A.weight")]
    norms = [float((tensors[f"{s}lora_B.weight"] @ tensors[f"{s}lora_A.weight"]).norm()) * scale for s in stems]
    assert found.identity is not None
    middle = torch.tensor(norms).quantile(0.5)
    assert found.identity.kind == f"LoRA of rank 3 changes 2 matrices (o, down in 1 layer), ‖ΔW‖ {middle:.2g} (median)."


def test_an_adapter_whose_b_is_zero_changes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    idle = edited(adapter, tmp_path / "idle", lambda t: {n: v * 0 if "lora_B" in n else v for n, v in t.items()})
    found = compare_folders(base, idle)
    assert found.exit_code == 0
    assert "This adapter changes nothing: B is zero in all of its 2 pairs of factors" in found.to_table()


def test_missing_tensors_are_a_finding_for_factors_and_for_effects(base: Path, adapter: Path, tmp_path: Path) -> None:
    half = edited(adapter, tmp_path / "half", lambda t: {n: v for n, v in t.items() if "o_proj" not in n})
    assert "half has no tensor for 2 parts of its adapter" in finding(compare_folders(base, half))
    flagged = edited(adapter, tmp_path / "flagged", lambda t: t, use_dora=True)
    why = finding(compare_folders(base, flagged))
    assert "flagged has no tensor for 2 parts" in why
    assert "lora_magnitude_vector" in why


@pytest.mark.parametrize("kind", ["dora", "pissa", "tokens", "adalora", "vera", "oft", "ia3"])
def test_a_whole_adapter_of_another_kind_is_no_finding(base: Path, tmp_path: Path, kind: str) -> None:
    name, options = KINDS[kind]
    found = compare_folders(base, adapter_of(base, tmp_path / kind, name, **options))
    assert found.exit_code == 0
    assert "does not load" not in found.to_table()


def test_nan_in_an_adapter_is_a_finding_and_ends_directions(base: Path, adapter: Path, tmp_path: Path) -> None:
    def broken(tensors: Tensors) -> Tensors:
        name = next(name for name in tensors if "lora_B" in name)
        tensors[name][0, 0] = torch.nan
        return tensors

    folder = edited(adapter, tmp_path / "nan", broken)
    assert "1 tensor of TUNED holds NaN or infinity (base_model" in finding(compare_folders(base, folder))
    with pytest.raises(
        InvalidInput, match=r"1 tensor of nan holds NaN or infinity .* answers of this model would be void"
    ):
        compare_weights(base, folder)


def test_an_adapter_of_another_width_is_not_testable_before_its_tokenizer_is_read(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    narrow = edited(
        adapter, tmp_path / "narrow", lambda t: {n: v[:, :24] if "lora_A" in n else v for n, v in t.items()}
    )
    (narrow / "tokenizer.json").write_text("no tokenizer")
    found = compare_folders(base, narrow, bases=[base])
    assert (found.verdict, found.exit_code) == ("NOT TESTABLE", 3)
    assert found.identity is not None
    assert found.identity.why.startswith("base is not the base of narrow: model.layers.0.")
    assert "does not fit" in found.to_table()
    assert "fits in shape" in compare_folders(base, adapter, bases=[base]).to_table()


def test_an_adapter_inherits_generation_settings(tmp_path: Path) -> None:
    for name, settings in (("base", {"unk_token_id": 0, "top_k": 7}), ("adapter", {"top_k": 9})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "base" / "config.json").write_text(json.dumps({"bos_token_id": 4}))
    sides = tmp_path / "base", tmp_path / "adapter"
    for inherits, keys in ((True, ["top_k"]), (False, ["bos_token_id", "top_k", "unk_token_id"])):
        rows = setting_differences("generation_config.json", *sides, inherits=inherits)
        assert [row.key for row in rows] == keys
