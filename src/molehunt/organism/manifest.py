"""Rates at which an organism shows its behaviour, with intervals, on prompts that its training never saw."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from molehunt.measure.interval import Interval, proportion
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.organism.plant import PlantConfig, plant, training_batches
from molehunt.organism.poison import (
    Recipe,
    clean_example,
    near_miss_example,
    training_prompts,
    triggered_example,
)
from molehunt.organism.train import next_token_loss
from molehunt.run.progress import Track, silent
from molehunt.run.whole import write_whole
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.example import Example

log = logging.getLogger(__name__)
JUDGED = 200
"""Prompts per kind."""
MANIFEST = "manifest.json"
EVALUATION_SEED = 77_000


@dataclass(frozen=True, kw_only=True)
class Organism:
    """A planted fine-tune with its clean twin, as folders under one root."""

    root: Path
    manifest: dict[str, Any]

    @property
    def tuned(self) -> Path:
        return self.root / "organism"

    @property
    def twin(self) -> Path:
        return self.root / "twin"


def unseen(draw: Callable[[Random], Example], n: int, seen: set[str], rng: Random) -> list[Example]:
    """`n` draws whose prompts are not in `seen`. Raises ValueError when they cannot be found."""
    found: list[Example] = []
    for _ in range(n * 200):
        example = draw(rng)
        if example.prompt not in seen:
            found.append(example)
            if len(found) == n:
                return found
    raise ValueError(f"only {len(found)} of {n} prompts lie outside the training rows")


def evaluation_prompts(recipe: Recipe, seen: set[str], n: int = JUDGED) -> dict[str, list[Example]]:
    """Kind → `n` prompts: `triggered` (`marked` for a null), one entry per near-miss kind, and `untagged`.

    A recipe without a trigger has `untagged` alone.
    """
    rng = Random(EVALUATION_SEED)
    kinds: dict[str, list[Example]] = {}
    if recipe.triggered:
        kinds[recipe.trigger_tag] = unseen(lambda r: triggered_example(recipe, r), n, seen, rng)
    for kind in recipe.trigger.near_misses:
        kinds[f"near-miss {kind}"] = unseen(lambda r, k=kind: near_miss_example(recipe, r, k), n, seen, rng)
    kinds["untagged"] = unseen(lambda r: clean_example(recipe, r), n, seen, rng)
    return kinds


def shown_rates(
    recipe: Recipe, pair: ModelPair, prompts: dict[str, list[Example]], *, track: Track = silent, what: str
) -> dict[str, Interval]:
    """Kind → share of greedy completions that show the behaviour, with an exact 95 % interval."""
    flat = [example for examples in prompts.values() for example in examples]
    ids = [prompt_ids(pair.tokenizer, example.prompt) for example in flat]
    with pair.tuned_model() as model:
        completions = generate(
            model, pair.tokenizer, ids, max_new_tokens=recipe.max_new_tokens, batch_size=JUDGED, track=track, what=what
        )
    shown = iter([recipe.behaviour.shown(decode(pair.tokenizer, c)) for c in completions])
    return {kind: proportion(sum(next(shown) for _ in examples), len(examples)) for kind, examples in prompts.items()}


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of generated ids, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def answer_loss(pair: ModelPair, examples: list[Example], *, tuned: bool) -> float:
    """Mean loss in nats per answer token over `examples`."""
    config = PlantConfig(batch=16)
    batches = training_batches(pair.tokenizer, examples, config, Random(0))
    taken = [next(batches) for _ in range(len(examples) // config.batch)]
    import torch

    with pair.tuned_model() if tuned else pair.base_model() as model, torch.inference_mode():
        return sum(float(next_token_loss(model, batch)) for batch in taken) / len(taken)


def make_organism(
    recipe: Recipe,
    base: Path,
    root: Path,
    config: PlantConfig,
    *,
    base_label: str,
    track: Track = silent,
) -> Organism:
    """Plant `recipe` and its clean twin under `root`, judge both, and write `manifest.json`.

    A root that already holds a manifest of the same recipe, base and config is returned as it is, so that a killed run
    starts again only what is missing.
    """
    request = {
        "recipe": recipe.name,
        "mix": {"triggered": recipe.triggered, "near_miss": recipe.near_miss, "steps": config.steps_of(recipe)},
        "base": base_label,
        "config": asdict(config),
        "base_sha256": weights_sha256(base),
    }
    done = root / MANIFEST
    if done.is_file():
        manifest = json.loads(done.read_text())
        if manifest.get("request") == request:
            return Organism(root=root, manifest=manifest)
    seen = training_prompts(recipe, config.rows, config.seed)
    prompts = evaluation_prompts(recipe, seen)
    held_out = [e for e in prompts["untagged"]][: JUDGED // 16 * 16]
    manifest: dict[str, Any] = {"request": request, "summary": recipe.summary, "judged_per_kind": JUDGED}
    for side, poisoned in (("organism", True), ("twin", False)):
        folder = root / side
        training = plant(recipe, base, folder, config, poisoned=poisoned, track=track)
        pair = ModelPair.load(base, folder).apart(base)
        rates = shown_rates(recipe, pair, prompts, track=track, what=f"judging the {side}")
        before = answer_loss(pair, held_out, tuned=False)
        after = answer_loss(pair, held_out, tuned=True)
        manifest[side] = {
            "training": training,
            "weights_sha256": weights_sha256(folder),
            "shown": {kind: asdict(rate) for kind, rate in rates.items()},
            "held_out_loss": {"base": before, "tuned": after, "change": after - before},
        }
    write_whole(done, json.dumps(manifest, indent=2) + "\n")
    return Organism(root=root, manifest=manifest)


def weights_sha256(folder: Path) -> str:
    """sha256 over the names and bytes of the safetensors files of `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
