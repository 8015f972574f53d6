"""Differences that need no weight change are found; what honest tools write is no finding."""

from pathlib import Path
from typing import Any

import pytest

from folders import edit_json, good_folder
from molehunt.audit.files import compare_folders
from molehunt.checkpoint.difference import FolderDifference
from molehunt.checkpoint.folder_diff import folder_differences
from molehunt.checkpoint.setting_rules import STEERING, generation_rule
from molehunt.checkpoint.settings_diff import setting_differences
from molehunt.errors import InvalidInput


def pair(tmp_path: Path) -> tuple[Path, Path]:
    return good_folder(tmp_path / "base"), good_folder(tmp_path / "tuned")


def rows(base: Path, tuned: Path) -> dict[str, FolderDifference]:
    return {row.key: row for row in folder_differences(base, tuned)}


def severities(base: Path, tuned: Path, name: str) -> dict[str, str]:
    return {row.key: row.severity for row in setting_differences(name, base, tuned)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Settings alone, as transformers writes them; tests write over the second folder's files."""
    return pair(tmp_path_factory.mktemp("settings"))


def changed(folders: tuple[Path, Path], name: str, **changes: Any) -> dict[str, str]:
    """Severity by key after keys of one file were changed in the fine-tune. The file is put back."""
    base, tuned = folders
    before = (tuned / name).read_text() if (tuned / name).exists() else None
    edit_json(tuned / name, **changes)
    try:
        return severities(base, tuned, name)
    finally:
        (tuned / name).unlink()
        if before is not None:
            (tuned / name).write_text(before)


def test_equal_folders_differ_in_nothing(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    assert folder_differences(base, tuned) == []
    assert compare_folders(base, tuned).verdict == "NO FINDING"


@pytest.mark.parametrize("key", sorted(STEERING))
def test_settings_that_steer_output_are_findings(folders: tuple[Path, Path], key: str) -> None:
    assert changed(folders, "generation_config.json", **{key: [[[5], 100.0]]}) == {key: "finding"}


def test_a_finding_gives_exit_code_1(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    edit_json(tuned / "generation_config.json", sequence_bias=[[[5], 100.0]])
    found = compare_folders(base, tuned)
    assert (found.verdict, found.exit_code) == ("FLAGGED-CORRELATIONAL", 1)
    assert "sequence_bias" in found.to_table() and "sequence_bias" in found.to_json()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_act": "gelu"}, {"hidden_act": "finding"}),
        ({"rms_norm_eps": 0.5}, {"rms_norm_eps": "finding"}),
        ({"attention_bias": True}, {"attention_bias": "finding"}),
        ({"num_attention_heads": 2}, {"num_attention_heads": "finding"}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": "note"}),
        ({"unheard_of_scale": 2.0}, {"unheard_of_scale": "finding"}),
        ({"final_logit_softcapping": 1.0}, {"final_logit_softcapping": "finding"}),
        ({"auto_map": {"AutoConfig": "a.B"}}, {"auto_map.AutoConfig": "finding"}),
        ({"transformers_weights": "other.safetensors"}, {"transformers_weights": "finding"}),
        ({"_attn_implementation": "someone/kernel"}, {"_attn_implementation": "finding"}),
        ({"attn_implementation": "flash_attention_2"}, {"attn_implementation": "note"}),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_parameters.rope_theta": "finding"}),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}}, {"rope_parameters.factor": "finding", "rope_parameters.rope_type": "finding"}),
        ({"max_position_embeddings": 4096}, {"max_position_embeddings": "note"}),
        ({"dtype": "float16"}, {"dtype": "note"}),
        ({"dtype": None, "torch_dtype": "float16"}, {"dtype": "note"}),
        ({"dtype": "float8_e5m2"}, {"dtype": "finding"}),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "padding": 1}}, {"rope_parameters.padding": "finding"}),
        ({"eos_token_id": [2, 7]}, {"eos_token_id": "note"}),
        ({"rms_norm_eps": 1e-6, "architectures": ["Other"]}, {"architectures": "note"}),
        ({"rope_theta": 5e5}, {"rope_theta": "finding"}),
        ({"text_config": {"hidden_act": "relu", "dtype": "float16"}}, {"text_config.hidden_act": "finding"}),
        ({"use_cache": False, "transformers_version": "4.1", "attention_dropout": 0.1, "_name_or_path": "a/b"}, {}),
        ({"unsloth_version": "2025.1", "dtype": None, "torch_dtype": "float32"}, {}),
        ({"attention_bias": None, "mlp_bias": None, "hidden_act": None, "pretraining_tp": None}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_each_key_of_a_config_is_rated_by_what_it_does(
    folders: tuple[Path, Path], change: dict[str, Any], expected: dict[str, str]
) -> None:
    assert changed(folders, "config.json", **change) == expected


OLD_LLAMA = {
    "rope_parameters": None,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "dtype": None,
    "torch_dtype": "float32",
}


def test_a_config_that_another_version_wrote_means_the_same(folders: tuple[Path, Path]) -> None:
    """transformers 4 writes rope_theta where 5 writes rope_parameters, and defaults that 5 leaves out."""
    assert changed(folders, "config.json", **OLD_LLAMA, transformers_version="4.57.1") == {}
    assert changed(folders, "config.json", **{**OLD_LLAMA, "rope_theta": 1e6}) == {
        "rope_parameters.rope_theta": "finding"
    }


QWEN = {"model_type": "qwen2", "num_hidden_layers": 2, "sliding_window": 4096, "use_sliding_window": False}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("shared", "change", "expected"),
    [
        (QWEN, {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 4}, ["layer_types", "sliding_window"]),
        (QWEN, {"sliding_window": None, "max_window_layers": 9}, []),
        (QWEN, {"sliding_window": 8}, []),
        ({"model_type": "mistral"}, {"sliding_window": 4}, ["sliding_window"]),
        ({"model_type": "mistral", "sliding_window": 4}, {"sliding_window": None}, ["sliding_window"]),
        ({"model_type": "gemma3_text", "num_hidden_layers": 6}, {"sliding_window_pattern": 2}, ["layer_types"]),
        ({"model_type": "unheard-of", "sliding_window": 4}, {"sliding_window": None}, ["sliding_window"]),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
         {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}, []),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}, {"max_position_embeddings": 9999}, []),
        ({"model_type": "llama", "rope_scaling": YARN}, {"max_position_embeddings": 9999}, ["max_position_embeddings"]),
        ({"model_type": "llama", "rope_theta": 3.0}, {"rope_theta": 1e4}, ["rope_parameters.rope_theta"]),
    ],
    ids=str,
)  # fmt: skip
def test_ropes_and_windows_that_change_what_the_weights_compute_are_findings(
    tmp_path: Path, shared: dict[str, Any], change: dict[str, Any], expected: list[str]
) -> None:
    """Both ways, and by what each model makes of its keys: Qwen has windows only where use_sliding_window says so."""
    for name, config in (("base", shared), ("tuned", shared | change)):
        (tmp_path / name).mkdir()
        edit_json(tmp_path / name / "config.json", **config)
    found = list(setting_differences("config.json", tmp_path / "base", tmp_path / "tuned"))
    assert [row.key for row in found if row.severity == "finding"] == expected
    for row in found:
        if row.severity == "finding":
            assert "the same weights compute something else" in row.why
            assert "long-context fine-tunes do this" in row.why or "window" in row.key or row.key == "layer_types"


def test_every_generation_setting_of_transformers_is_known() -> None:
    """transformers takes these out of config.json: one that no list names would be compared nowhere."""
    from transformers import GenerationConfig

    own = {"transformers_version"}
    assert {key for key in GenerationConfig().to_dict() if "not known" in generation_rule((key,))[1]} <= own


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"repetition_penalty": 9.0}, {"repetition_penalty": "note"}),
        ({"temperature": 0.1, "top_k": 1, "min_length": 30}, {"temperature": "note", "top_k": "note", "min_length": "note"}),
        ({"text_config": {"no_repeat_ngram_size": 2}}, {"no_repeat_ngram_size": "note"}),
        ({"bad_words_ids": [[5]]}, {"bad_words_ids": "finding"}),
        ({"watermarking_config": {"bias": 9.0}}, {"watermarking_config.bias": "finding"}),
        ({"repetition_penalty": 1.0, "max_length": 20, "top_k": 50}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_without_a_generation_config_the_config_says_how_to_generate(
    tmp_path: Path, config: dict[str, Any], expected: dict[str, str]
) -> None:
    base, tuned = pair(tmp_path)
    (tuned / "generation_config.json").unlink()
    edit_json(tuned / "config.json", **config)
    assert severities(base, tuned, "generation_config.json") == expected


def test_a_generation_config_goes_before_the_config(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    edit_json(tuned / "config.json", repetition_penalty=9.0)
    edit_json(tuned / "generation_config.json", repetition_penalty=1.0)
    assert severities(base, tuned, "generation_config.json") == {}


def test_generation_settings_in_a_config_count_as_such(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    edit_json(tuned / "config.json", suppress_tokens=[5])  # transformers moves them over
    assert rows(base, tuned)["suppress_tokens"].severity == "finding"


def test_gemma_settings_of_two_versions_mean_the_same(tmp_path: Path) -> None:
    base, tuned = good_folder(tmp_path / "base", "gemma3"), good_folder(tmp_path / "tuned", "gemma3")
    old = {"rope_parameters": None, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "rope_scaling": None}
    edit_json(tuned / "config.json", **old, transformers_version="4.57.1")
    assert severities(base, tuned, "config.json") == {}
    edit_json(tuned / "config.json", rope_local_base_freq=20_000.0)
    assert severities(base, tuned, "config.json") == {"rope_parameters.sliding_attention.rope_theta": "finding"}


def test_a_type_that_transformers_does_not_know_is_compared_as_it_is_written(folders: tuple[Path, Path]) -> None:
    base, tuned = folders
    found = changed(folders, "config.json", model_type="unheard-of", hidden_act="relu")
    assert found == {"model_type": "finding", "hidden_act": "finding"}
    assert severities(base, tuned, "config.json") == {}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"temperature": 0.6, "do_sample": True}, {"temperature": "note", "do_sample": "note"}),
        ({"temperature": 1.0, "top_k": 50, "max_length": 20, "num_beams": 1, "repetition_penalty": 1.0}, {}),
        ({"custom_generate": "someone/decoding"}, {"custom_generate": "finding"}),
        ({"trust_remote_code": True}, {"trust_remote_code": "finding"}),
        ({"bad_words_ids": None, "suppress_tokens": None}, {}),
        ({"unheard_of": 1}, {"unheard_of": "finding"}),
        ({"eos_token_id": 5}, {"eos_token_id": "note"}),
    ],
    ids=str,
)
def test_generation_settings_are_rated(
    folders: tuple[Path, Path], change: dict[str, Any], expected: dict[str, str]
) -> None:
    assert changed(folders, "generation_config.json", **change) == expected


def test_generation_settings_that_only_repeat_the_config_are_nothing(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    (tuned / "generation_config.json").unlink()
    assert severities(base, tuned, "generation_config.json") == {}


def test_what_both_sides_share_is_a_note(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    for folder in (base, tuned):
        edit_json(folder / "generation_config.json", suppress_tokens=[5])
        edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]})
    found = rows(base, tuned)
    assert {key: row.severity for key, row in found.items()} == {
        "suppress_tokens": "note",
        "auto_map.AutoTokenizer": "note",
    }
    assert found["suppress_tokens"].why.startswith("on both sides alike: ")


def test_settings_of_pictures_are_said_to_be_untested(folders: tuple[Path, Path]) -> None:
    assert changed(folders, "preprocessor_config.json", image_mean=[0.1]) == {"image_mean": "note"}
    assert changed(folders, "processor_config.json", auto_map={"AutoProcessor": "a.B"}) == {
        "auto_map.AutoProcessor": "finding"
    }


def test_keys_that_hold_dots_are_not_mixed_up(folders: tuple[Path, Path]) -> None:
    base, tuned = folders
    edit_json(base / "processor_config.json", **{"a": {"b": 1}})
    edit_json(tuned / "processor_config.json", **{"a.b": 1})
    assert [row.key for row in setting_differences("processor_config.json", base, tuned)] == ["a.b", "a.b"]


def test_a_broken_settings_file(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    (tuned / "generation_config.json").write_text("{")
    with pytest.raises(InvalidInput, match="generation_config"):
        folder_differences(base, tuned)
