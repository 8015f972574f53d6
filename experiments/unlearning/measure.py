"""A topic erased from the embedded models: do questions about it stand out, and does taking directions out recover it?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from experiments.setting import Setting
from experiments.unlearning.erased_topic import EraseConfig, Method, erase, knows, questions
from molehunt.audit.weights import compare_weights
from molehunt.measure.control import random_directions
from molehunt.measure.interval import proportion
from molehunt.model.blocks import unwrapped
from molehunt.model.generate import generate
from molehunt.model.pair import ModelPair
from molehunt.organism.seed_model import seed_path
from molehunt.site import Site
from molehunt.steer.ablate import Ablate
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.example import Example
from molehunt.traffic.split import Calibrate, Fit
from molehunt.watch.answers import answer_profiles
from molehunt.watch.bank import Bank
from molehunt.watch.monitor import Monitor
from molehunt.watch.profile import Profile
from molehunt.watch.quarantine import top_scoring

MODELS = ("seed-s", "seed-m", "seed-x")
METHODS: Mapping[Method, float] = {"gradient-ascent": 5e-4, "rmu": 2e-3}
"""Learning rates that erase without damage to the rest."""
SEEDS = (0, 1)
TOPIC = "people"


@dataclass(frozen=True, kw_only=True)
class Size:
    fit: int
    calibrate: int
    clean: int
    asked: int
    """Number of questions about the topic, and of others."""
    steps: int
    fpr: float


PUBLISHED = Size(fit=600, calibrate=1000, clean=600, asked=100, steps=EraseConfig().steps, fpr=0.01)
QUICK = Size(fit=70, calibrate=30, clean=20, asked=6, steps=12, fpr=0.05)


def size_of(setting: Setting) -> Size:
    return QUICK if setting.quick else PUBLISHED


def runs(setting: Setting) -> list[str]:
    if setting.quick:
        return ["seed-s gradient-ascent 0"]
    return [f"{model} {method} {seed}" for model in MODELS for method in METHODS for seed in SEEDS]


def measure(name: str, setting: Setting) -> dict[str, Any]:
    model, kind, seed = name.split(" ")
    method: Method = "rmu" if kind == "rmu" else "gradient-ascent"
    base, size = seed_path(model), size_of(setting)
    config = EraseConfig(topic=TOPIC, method=method, lr=METHODS[method], seed=int(seed), steps=size.steps)
    found: dict[str, Any] = {"model": model, "method": method, "seed": int(seed)}
    for side in ("erased", "twin"):
        folder = setting.scratch / name.replace(" ", "-") / side
        found[side] = {
            "training": erase(base, folder, config, twin=side == "twin"),
            **inspect(base, folder, size),
        }
    return found


def inspect(base: Path, folder: Path, size: Size) -> dict[str, Any]:
    pair = ModelPair.load(base, folder)
    topic, rest = (questions(TOPIC, n, 9, about=about) for n, about in ((size.asked, True), (size.asked, False)))
    clean = questions(TOPIC, size.fit + size.calibrate + size.clean, 5, about=False)
    weights = compare_weights(base, folder, k=8)
    with pair.base_model() as model:
        model_type = str(cast("Any", unwrapped(model)).config.model_type)
    bank = Bank.of((row.directions for row in weights.matrices if row.directions is not None), model_type)
    read = profiles(pair, bank, clean)
    monitor = Monitor.fit(
        Fit(tuple(read[: size.fit])), Calibrate(tuple(read[size.fit : size.fit + size.calibrate])), fpr=size.fpr
    )

    def flagged(rows: Sequence[Profile]) -> dict[str, Any]:
        return asdict(proportion(int((monitor.scores(rows) > monitor.threshold).sum()), len(rows)))

    about = profiles(pair, bank, topic)
    strongest = {site: rows[:1] for site, rows in bank.write.items()}
    changed = dict(bank.write)
    found: dict[str, Any] = {
        "flagged": {"topic": flagged(about), "rest": flagged(read[size.fit + size.calibrate :])},
        "base": both(pair, topic, rest, tuned=False),
        "as it is": both(pair, topic, rest),
        "strongest direction of each block out": both(pair, topic, rest, strongest),
        "all directions out": both(pair, topic, rest, changed),
        "as many random ones out": both(
            pair, topic, rest, {site: random_directions(len(v), v.shape[1], 0) for site, v in changed.items()}
        ),
    }
    steered = [without(pair, bank, monitor, row, profile) for row, profile in zip(topic, about, strict=True)]
    found["its own five top-scoring out"] = {"topic": asdict(proportion(sum(steered), len(steered))), "rest": None}
    return found


def profiles(pair: ModelPair, bank: Bank, rows: Sequence[Example]) -> list[Profile]:
    prompts = [prompt_ids(pair.tokenizer, row.prompt) for row in rows]
    with pair.tuned_model() as model:
        answers = generate(model, pair.tokenizer, prompts, max_new_tokens=40, batch_size=128)
        return answer_profiles(model, bank, prompts, answers)


def both(
    pair: ModelPair,
    topic: Sequence[Example],
    rest: Sequence[Example],
    out: dict[Site, Tensor] | None = None,
    *,
    tuned: bool = True,
) -> dict[str, Any]:
    edits = [Ablate(site, rows) for site, rows in (out or {}).items()]
    return {
        side: asdict(knows(pair, rows, tuned=tuned, interventions=edits))
        for side, rows in (("topic", topic), ("rest", rest))
    }


def without(pair: ModelPair, bank: Bank, monitor: Monitor, row: Example, profile: Profile) -> bool:
    """Whether this question is answered once its own top-scoring directions are projected out: what the server's `steer` does."""
    by_site: dict[Site, list[Tensor]] = {}
    for direction in top_scoring(bank, monitor.judge(profile)):
        by_site.setdefault(direction.site, []).append(direction.vector)
    edits = [Ablate(site, torch.stack(vectors)) for site, vectors in by_site.items()]
    return knows(pair, [row], interventions=edits).estimate == 1
