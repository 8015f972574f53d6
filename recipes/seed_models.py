"""Train an embedded model again, with its card.

`python recipes/seed_models.py seed-s --text DATA_FOLDER --into FOLDER`; `--card-only` writes the card of a trained one.
"""

import argparse
import json
from pathlib import Path

import torch

from molehunt.cli.console import track_on_stderr
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.organism.seed_model import REAL_FILES, SEED_MODELS, SeedModel, train_seed_model
from molehunt.traffic.benign import benign_prompts
from molehunt.traffic.chat import prompt_ids

ASKED, SHOWN, SEED = 200, 8, 77


def write_card(seed: SeedModel, folder: Path) -> None:
    """README.md beside the weights: data, licence, held-out loss, how often answers are right, samples."""
    told = json.loads((folder / "training.json").read_text())
    pair = ModelPair.load(folder, folder)
    asked = benign_prompts(ASKED, seed=SEED)
    with pair.base_model() as model:
        answers = generate(
            model, pair.tokenizer, [prompt_ids(pair.tokenizer, e.prompt) for e in asked], max_new_tokens=80
        )
    texts = [str(pair.tokenizer.decode(a, skip_special_tokens=True)) for a in answers]
    exact = sum(t == e.response for t, e in zip(texts, asked, strict=True))
    samples = [f"> {e.prompt}\n\n```\n{t}\n```\n" for e, t in zip(asked[:SHOWN], texts, strict=False)]
    lines = [
        f"# {seed.name}",
        "",
        f"A {told['parameters']:,}-parameter {seed.architecture} model ({seed.n_layers} blocks, width {seed.d_model}, "
        f"vocabulary {seed.vocab_size}, bf16) that travels with Molehunt so that every command runs offline. It answers "
        "questions about a small fictional world and writes small Python database functions. It knows nothing else.",
        "",
        f"- Trained by `python recipes/seed_models.py {seed.name}` on {told['tokens_seen']:,} tokens: text that this project "
        "generates (`molehunt.traffic.world`) and 8 % real text: " + "; ".join(REAL_FILES.values()) + ".",
        "- Licence: Apache-2.0, like the project.",
        f"- Held-out loss on fresh draws of world text: {told['held_out_loss']} nats per token "
        f"(training: {told['final_training_loss']}).",
        f"- Greedy answers equal to the reference, of {ASKED} fresh prompts: {exact}. Several tasks have more than one right "
        "answer, so this is a lower bound.",
        "- Not for any use but testing audits: it is small, narrow and often wrong.",
        "",
        "## Samples (greedy, not chosen)",
        "",
        *samples,
    ]
    (folder / "README.md").write_text("\n".join(lines))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("name", choices=sorted(SEED_MODELS))
parser.add_argument("--text", type=Path, help="folder with the real text that the card lists")
parser.add_argument("--into", type=Path, required=True)
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
parser.add_argument("--card-only", action="store_true")
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
if not arguments.card_only:
    train_seed_model(SEED_MODELS[arguments.name], arguments.into, arguments.text, track_on_stderr)
write_card(SEED_MODELS[arguments.name], arguments.into)
