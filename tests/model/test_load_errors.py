"""What a folder makes of transformers' errors: never a traceback, and the package or the field by its name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from folders import edit_json, good_folder
from molehunt.checkpoint.config_limits import check_config, suspected_field
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import InvalidInput, MolehuntError, NotTestable, UsageError
from molehunt.model.load_errors import loading
from molehunt.model.loading import load_model

CPU = torch.device("cpu")
METHODS = (
    "bitsandbytes", "gptq", "awq", "aqlm", "vptq", "quanto", "eetq", "higgs", "hqq", "compressed-tensors", "torchao",
    "spqr", "quark", "fp_quant", "auto-round", "nvfp4", "sinq", "fbgemm_fp8",
)  # fmt: skip
FIELDS: dict[str, Any] = {
    "load_in_4bit": True, "bits": 4, "weights": "int8", "quant_type": "int4_weight_only", "export": {},
    "config_for_layers": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "changed"))


@pytest.mark.parametrize("method", METHODS)
def test_a_quantiser_that_is_missing_is_named(folder: Path, method: str) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": method, **FIELDS})
    try:
        load_model(folder, CPU, torch.float32)
    except NotTestable as error:
        assert f"is quantised by {method}" in str(error)
        assert "pip install " in str(error) or "unquantised release" in str(error)
    except InvalidInput as error:  # where the package is installed
        assert "shape" in str(error) or "loaded" in str(error)
    else:
        pytest.fail("plain weights were loaded as if they were packed")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_key_value_heads", 0, "num_key_value_heads = 0"),
        ("head_dim", 0, "head_dim = 0"),
        ("head_dim", 10**9, "head_dim = 1000000000"),
        ("num_attention_heads", -4, "num_attention_heads = -4"),
        ("num_key_value_heads", 2.5, "num_key_value_heads = 2.5"),
        ("hidden_size", "x", "hidden_size = 'x'"),
        ("num_labels", 10**9, "num_labels = 1000000000"),
        ("hidden_act", "nonsense", "hidden_act = 'nonsense'"),
        ("rope_parameters", {"rope_type": "nonsense"}, "rope_parameters"),
        ("rms_norm_eps", [], "rms_norm_eps = []"),
        ("_attn_implementation", "kernels-community/x", "_attn_implementation = 'kernels-community/x'"),
        ("attn_implementation", {"text": "someone/else"}, "attn_implementation"),
        ("experts_implementation", "someone/else:layer", "experts_implementation"),
    ],
)
def test_a_field_that_no_model_has_is_named(folder: Path, field: str, value: Any, says: str) -> None:
    edit_json(folder / "config.json", **{field: value})
    with pytest.raises(InvalidInput, match=r"config\.json") as refused:
        load_model(folder, CPU, torch.float32)
    assert says in str(refused.value)


def test_attention_code_of_a_package_is_replaced_by_the_built_in_one(folder: Path) -> None:
    edit_json(folder / "config.json", _attn_implementation="flash_attention_2")
    model: Any = load_model(folder, CPU, torch.float32)
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_no_value_of_any_field_ends_in_another_error(tmp_path: Path, architecture: str) -> None:
    folder = good_folder(tmp_path, architecture)
    config = json.loads((folder / "config.json").read_text())
    values: list[Any] = [0, -1, 10**30, float("nan"), "\ud800", None, [[]], {"rope_type": "linear"}]
    fields = [*config, "quantization_config", "layer_types", "pruned_heads", "auto_map", "text_config"]
    for i, field in list(enumerate(fields))[len(architecture) % 3 :: 3]:
        (folder / "config.json").write_text(json.dumps({**config, field: values[i % len(values)]}))
        try:
            Checkpoint.open(folder)
            load_model(folder, CPU, torch.float32)
        except MolehuntError as error:
            assert error.exit_code in (3, 4), f"{field}: {error}"


def test_a_config_may_have_sizes_for_each_layer_and_nested_configs() -> None:
    check_config({"intermediate_size": [8, 16], "num_key_value_heads": None, "text_config": {"head_dim": 64}})
    for nested in ({"text_config": {"hidden_size": 2**30}}, {"a_config": {"b_config": {"head_dim": -1}}}):
        with pytest.raises(InvalidInput, match="is believed"):
            check_config(nested)


def test_the_suspected_field_is_the_one_that_the_error_names() -> None:
    config = {"head_dim": 0, "hidden_act": "silu2", "rope_theta": 1.0}
    assert "rope_theta = 1.0" in suspected_field(config, "rope_theta must be large")
    assert "hidden_act = 'silu2'" in suspected_field(config, "function silu2 not found")
    assert "head_dim = 0" in suspected_field(config, "integer division or modulo by zero")
    assert suspected_field({"head_dim": 8}, "integer division or modulo by zero") == ""


class Panic(BaseException):
    """As pyo3's PanicException, which no `except Exception` holds."""


@pytest.mark.parametrize(
    "error", [AssertionError(), ZeroDivisionError("z"), RecursionError("r"), Panic("p"), OSError("o")]
)
def test_any_error_is_one_of_the_folder(tmp_path: Path, error: BaseException) -> None:
    with (
        pytest.raises(InvalidInput, match=f"cannot be loaded as a thing: {type(error).__name__}"),
        loading(tmp_path, "a thing"),
    ):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UsageError("mine"), NotTestable("mine")])
def test_errors_that_are_no_fault_of_the_folder_pass(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, loading(tmp_path, "a thing"):
        raise error
    assert raised.value is error


def test_a_missing_module_is_named_without_a_quantisation(tmp_path: Path) -> None:
    with pytest.raises(NotTestable, match="pip install sentencepiece"), loading(tmp_path, "a tokenizer"):
        raise ModuleNotFoundError("No module named 'sentencepiece.x'", name="sentencepiece.x")
