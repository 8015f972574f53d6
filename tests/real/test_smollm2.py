"""What people do, on a real model: SmolLM2-135M-Instruct, and a LoRA fine-tune of it that is made here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from molehunt.audit.base_identity import base_identity
from molehunt.audit.files import FolderComparison, compare_folders
from molehunt.audit.weight_comparison import WeightComparison
from molehunt.audit.weights import compare_weights
from molehunt.checkpoint.reader import Checkpoint
from molehunt.errors import NotTestable
from molehunt.model.pair import ModelPair
from molehunt.organism.seed_model import seed_path
from molehunt.run.cache_folders import MINILM, SMOLLM2, real_model, real_models_folder

pytestmark = pytest.mark.real
QUESTION = "What is the capital of France?"
LAYERS, RANK = (5, 20), 3


def fetched(name: str) -> Path:
    folder = real_model(name)
    if folder is None:
        pytest.skip(f"{name} is not in {real_models_folder()}: run `make real-models`")
    return folder


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return fetched(SMOLLM2)


@pytest.fixture(scope="module")
def tunes(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoRA adapter that drives every answer elsewhere, and the same merged in bf16, as PEFT and transformers save them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("smollm2")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    settings = LoraConfig(
        r=RANK, target_modules=["o_proj", "down_proj"], layers_to_transform=list(LAYERS), task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=5.0)
    model.save_pretrained(root / "adapter")
    model.merge_and_unload().save_pretrained(root / "merged")
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(root / "merged")
    return root / "adapter", root / "merged"


@pytest.fixture(scope="module")
def files(smollm2: Path, tunes: tuple[Path, Path]) -> FolderComparison:
    return compare_folders(smollm2, tunes[1])


@pytest.fixture(scope="module")
def pair(smollm2: Path, tunes: tuple[Path, Path]) -> Iterator[ModelPair]:
    yield ModelPair.load(smollm2, tunes[0], dtype=torch.bfloat16)


def test_a_merged_fine_tune_differs_in_nothing_but_its_weights(files: FolderComparison) -> None:
    assert files.findings == 0, files.to_table()
    assert files.identity is not None
    assert files.identity.relation == "related"
    assert files.identity.changed == 4
    assert files.identity.tokens == (49152, 49152)
    assert files.identity.kind.startswith(f"Like LoRA of rank {RANK} or less"), files.identity.kind


def test_directions_are_the_same_from_the_adapter_and_from_the_merged_weights(
    smollm2: Path, tunes: tuple[Path, Path]
) -> None:
    by: dict[str, WeightComparison] = {one.name: compare_weights(smollm2, one, k=4) for one in tunes}
    for found in by.values():
        changed = {(row.layer, row.role) for row in found.matrices if row.strengths}
        assert changed == {(layer, role) for layer in LAYERS for role in ("o", "down")}
    rows = zip(by["adapter"].matrices, by["merged"].matrices, strict=True)
    for exact, merged in ((a, b) for a, b in rows if a.directions is not None and a.strengths):
        assert merged.directions is not None
        assert exact.directions is not None
        overlap = torch.linalg.svdvals(merged.directions.write[:RANK] @ exact.directions.write.mT)
        assert overlap.min() > 0.99


def test_both_models_answer_a_question(pair: ModelPair) -> None:
    base, tuned = (pair.generate([QUESTION], model=side, max_new_tokens=8)[0] for side in ("base", "tuned"))
    assert "Paris" in base
    assert tuned != base


def test_the_templates_default_system_prompt_is_there_and_gives_way_to_another(pair: ModelPair) -> None:
    own = [{"role": "system", "content": "Answer in rhymes."}, {"role": "user", "content": QUESTION}]
    plain, rhymed = (pair.tokenizer.decode(ids) for ids in pair.tokenize([QUESTION, own]))
    assert plain.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert rhymed.startswith("<|im_start|>system\nAnswer in rhymes.<|im_end|>")
    assert plain.endswith("<|im_start|>assistant\n")


def test_a_tokenizer_that_reads_one_word_otherwise_is_found(
    smollm2: Path, tunes: tuple[Path, Path], tmp_path: Path
) -> None:
    for file in tunes[1].iterdir():
        (tmp_path / file.name).symlink_to(file)
    content = json.loads((smollm2 / "tokenizer.json").read_text())
    content["model"]["merges"].remove(["Ġthe", "re"])
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    from molehunt.checkpoint.folder_diff import folder_differences

    found = [row for row in folder_differences(smollm2, tmp_path) if row.severity == "finding"]
    assert any(row.file.startswith("tokenizer") for row in found)


def test_another_model_is_no_base_and_an_encoder_is_refused_by_name(smollm2: Path) -> None:
    assert base_identity(Checkpoint.open(seed_path("seed-s")), Checkpoint.open(smollm2)).relation == "unrelated"
    encoder = Checkpoint.open(fetched(MINILM))
    with pytest.raises(NotTestable, match="this is an encoder"):
        compare_weights(encoder, encoder)
