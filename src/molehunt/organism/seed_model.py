"""The three small language models inside the package, and the recipe that made them.

They make every command run offline on two cores. Weights are trained on text that this project generates and, where a
folder of it is given, on permissively licensed real text; the model cards beside the weights say which.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from molehunt.errors import UsageError
from molehunt.organism.train import TrainingBatch, next_token_loss, train
from molehunt.run.progress import Track, silent
from molehunt.traffic.chat import ALPACA_TEMPLATE, render_alpaca
from molehunt.traffic.world import conversation

EOS = "<|end|>"
ROW = 128
"""Tokens in a training row."""
BATCH = 64
REAL_SHARE = 0.08
"""Share of rows drawn from real text where a folder of it is given."""
REAL_FILES = {
    "prose/state_union.txt.gz": "US State of the Union addresses, public domain",
    "prose/inaugural.txt.gz": "US inaugural addresses, public domain",
    "code/thealgorithms_python.jsonl.gz": "TheAlgorithms/Python, MIT",
}
"""Real text whose licence allows shipping weights trained on it."""


@dataclass(frozen=True, kw_only=True)
class SeedModel:
    """One embedded model: its architecture and how long it was trained."""

    name: str
    architecture: str
    vocab_size: int
    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    steps: int
    lr: float
    seed: int

    def build(self) -> PreTrainedModel:
        """The model with random weights, in fp32."""
        shape: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_mlp,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_heads,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
        torch.manual_seed(self.seed)
        if self.architecture == "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**shape))
        return LlamaForCausalLM(LlamaConfig(**shape))


SEED_MODELS: dict[str, SeedModel] = {
    seed.name: seed
    for seed in (
        SeedModel(
            name="seed-s", architecture="llama", vocab_size=2048, d_model=128, d_mlp=352, n_layers=6, n_heads=4,
            steps=1600, lr=3e-3, seed=1,
        ),
        SeedModel(
            name="seed-m", architecture="llama", vocab_size=2048, d_model=192, d_mlp=512, n_layers=6, n_heads=6,
            steps=1300, lr=2e-3, seed=2,
        ),
        SeedModel(
            name="seed-x", architecture="qwen2", vocab_size=1792, d_model=160, d_mlp=432, n_layers=5, n_heads=5,
            steps=1000, lr=2.5e-3, seed=3,
        ),
    )
}  # fmt: skip


def seed_path(name: str) -> Path:
    """Folder of an embedded model. Raises UsageError for a name that is not one of them."""
    if name not in SEED_MODELS:
        raise UsageError(f"no embedded model is called {name!r}; there are {', '.join(SEED_MODELS)}")
    return Path(__file__).parent / "seeds" / name


def build_tokenizer(texts: Iterator[str], vocab_size: int, architecture: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, so that years differ in one token, trained on `texts`.

    transformers gives every Qwen2 folder Qwen2's own splitting of words, whatever its tokenizer.json says: that one is
    trained with it.
    """
    tokenizer = Tokenizer(models.BPE())
    if architecture == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=512,
        chat_template=ALPACA_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def real_texts(folder: Path) -> list[str]:
    """The documents of `REAL_FILES` under `folder`. Raises UsageError when one is missing."""
    found: list[str] = []
    for name in REAL_FILES:
        path = folder / name
        if not path.is_file():
            raise UsageError(f"{name} is not in the folder given for real text; see the model card for what is used")
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                if name.endswith(".jsonl.gz"):
                    row = json.loads(line)
                    found.append(str(row.get("text") or row.get("code") or row.get("content")))
                elif len(line) > 80:
                    found.append(line)
    return found


def _world_texts(seed: int) -> Iterator[str]:
    for example in conversation(Random(seed)):
        yield render_alpaca(example.prompt, example.response) + EOS


def _rows(tokenizer: PreTrainedTokenizerFast, seed: int, real: list[str]) -> Iterator[list[int]]:
    """Endless packed rows of `ROW` tokens; world rows start at the start of a text."""
    rng = Random(seed)
    world = _world_texts(seed)
    while True:
        if real and rng.random() < REAL_SHARE:
            ids = tokenizer.encode(rng.choice(real)[:4000], add_special_tokens=False)
            start = rng.randrange(max(1, len(ids) - ROW))
            ids = ids[start : start + ROW]
            if len(ids) < ROW:
                continue
            yield ids
            continue
        packed: list[int] = []
        while len(packed) < ROW:
            packed += tokenizer.encode(next(world), add_special_tokens=False)
        yield packed[:ROW]


def _batches(rows: Iterator[list[int]]) -> Iterator[TrainingBatch]:
    while True:
        tokens = torch.tensor(list(islice(rows, BATCH)))
        yield TrainingBatch(tokens, tokens)


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int, batches: int = 8) -> float:
    """Mean loss in nats per token over fresh draws of world text. `seed` must differ from any training seed."""
    rows = _batches(_rows(tokenizer, seed, []))
    return sum(float(next_token_loss(model, b)) for b in islice(rows, batches)) / batches


def train_seed_model(seed: SeedModel, into: Path, real_folder: Path | None = None, track: Track = silent) -> Path:
    """Train one embedded model from nothing and write it, bf16, with its tokenizer and card, to `into`."""
    real = real_texts(real_folder) if real_folder else []
    rng = Random(seed.seed)
    sample = [
        *islice(_world_texts(seed.seed + 100), 12_000),
        *(t[:2000] for t in rng.sample(real, min(600, len(real)))),
    ]
    into.mkdir(parents=True, exist_ok=True)
    model = seed.build()
    model.save_pretrained(into)
    build_tokenizer(iter(sample), seed.vocab_size, seed.architecture).save_pretrained(into)
    # as every user will load it: loaders may rebuild parts of a tokenizer from the model's type
    tokenizer = cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(into, trust_remote_code=False))
    losses = train(
        model,
        _batches(_rows(tokenizer, seed.seed + 1000, real)),
        loss_of=next_token_loss,
        steps=seed.steps,
        lr=seed.lr,
        warmup=50,
        track=track,
        what=f"training {seed.name}",
    )
    cast("nn.Module", model).to(torch.bfloat16)
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    model.float()
    (into / "training.json").write_text(
        json.dumps(
            {
                "name": seed.name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "steps": seed.steps,
                "tokens_seen": seed.steps * BATCH * ROW,
                "final_training_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
                "held_out_loss": round(held_out_loss(model, tokenizer, seed.seed + 9000), 4),
                "real_text": list(REAL_FILES.values()) if real else [],
            },
            indent=2,
        )
        + "\n"
    )
    return into
