"""The embedded models, trained from nothing into the folder of this topic, each with its card."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.setting import Setting
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.organism.seed_model import REAL_FILES, SEED_MODELS, SeedModel, train_seed_model
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.world import benign_prompts

SHOWN, SEED = 8, 77
ASKED, QUICK_ASKED, QUICK_STEPS = 200, 16, 2


def runs(setting: Setting) -> list[str]:
    return ["seed-s"] if setting.quick else list(SEED_MODELS)


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Train the model, write its card, and ask it fresh questions. A quick run trains without the real text."""
    seed, folder = SEED_MODELS[name], setting.scratch / name
    if setting.quick:
        train_seed_model(replace(seed, steps=QUICK_STEPS), folder)
        return write_card(seed, folder, QUICK_ASKED)
    train_seed_model(seed, folder, setting.need_data("the real text that the models' cards list"))
    return write_card(seed, folder, ASKED)


def write_card(seed: SeedModel, folder: Path, n: int) -> dict[str, Any]:
    """README.md beside the weights: data, licence, held-out loss, how often answers are right, samples."""
    training = json.loads((folder / "training.json").read_text())
    pair = ModelPair.load(folder, folder)
    examples = benign_prompts(n, seed=SEED)
    with pair.base_model() as model:
        answers = generate(
            model, pair.tokenizer, [prompt_ids(pair.tokenizer, e.prompt) for e in examples], max_new_tokens=80
        )
    texts = [str(pair.tokenizer.decode(a, skip_special_tokens=True)) for a in answers]
    exact = sum(t == e.response for t, e in zip(texts, examples, strict=True))
    samples = [f"> {e.prompt}\n\n```\n{t}\n```\n" for e, t in zip(examples[:SHOWN], texts, strict=False)]
    lines = [
        f"# {seed.name}",
        "",
        f"A {training['parameters']:,}-parameter {seed.architecture} model ({seed.n_layers} blocks, width {seed.d_model}, "
        f"vocabulary {seed.vocab_size}, bf16) that travels with Molehunt so that every command runs offline. It answers "
        "questions about a small fictional world and writes small Python database functions. It knows nothing else.",
        "",
        f"- Trained by `python -m experiments seed-models` on {training['tokens_seen']:,} tokens: text that this project "
        "generates (`molehunt.traffic.world`) and 8 % real text: " + "; ".join(REAL_FILES.values()) + ".",
        "- Licence: Apache-2.0, like the project.",
        f"- Held-out loss on fresh draws of world text: {training['held_out_loss']} nats per token "
        f"(training: {training['final_training_loss']}).",
        f"- Greedy answers equal to the reference, of {n} fresh prompts: {exact}. Several tasks have more than one right "
        "answer, so this is a lower bound.",
        "- Not for any use but testing audits: it is small, narrow and often wrong.",
        "",
        "## Samples (greedy, not chosen)",
        "",
        *samples,
    ]
    (folder / "README.md").write_text("\n".join(lines))
    return {
        **training,
        "architecture": seed.architecture,
        "blocks": seed.n_layers,
        "width": seed.d_model,
        "asked": n,
        "right": exact,
    }
