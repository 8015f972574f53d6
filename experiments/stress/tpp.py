"""Setting TPP of the stress table: linear probes of what a text is about, and the latents that they rest on ablated."""

import csv
import gzip
import io
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from experiments.stress.payload import interval, study_fields
from experiments.stress.probe_behaviour import ProbedTexts, one_vs_rest
from experiments.stress.readout_behaviour import ReadoutConfig, clustered_share, stress_readout
from experiments.stress.taught import activations, dictionary_of
from molehunt.model.loading import load_model
from molehunt.model.tokenizers import load_tokenizer
from molehunt.organism.seed_model import SEED_MODELS, seed_path
from molehunt.site import Site
from molehunt.stress.attacks.attack import AttackConfig
from molehunt.stress.attacks.constraint import Exact
from molehunt.stress.attacks.objective import LinearReadout, least_norm
from molehunt.stress.defences.selection import LabelledText, by_probe_effect
from molehunt.stress.evaluation.norms import epsilon50, median
from molehunt.traffic.split import Fit, Fractions, Select, Test, split_rows
from molehunt.traffic.world import ASKS, ask

SEED = 0
DEPTH = 5 / 26
"""Relative depth of the published site: layer 5 of 26."""
CLASSES = 6
TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class Size:
    sizes: tuple[int, ...]
    """Numbers of ablated latents."""
    size: int
    """Number of ablated latents in the study."""
    each: int
    """Number of texts of each class, at most."""
    dictionary_steps: int
    config: ReadoutConfig


PUBLISHED = Size(
    sizes=(2, 5, 10, 20, 50, 100),
    size=20,
    each=400,
    dictionary_steps=500,
    config=ReadoutConfig(published=AttackConfig(steps=100, lr=0.1, target_margin=torch.inf)),
)
"""Nothing of the published attack on TPP is published but its result: these are the settings of its IOI runner."""
QUICK = Size(
    sizes=(5, 20),
    size=20,
    each=50,
    dictionary_steps=60,
    config=ReadoutConfig(published=AttackConfig(steps=8, lr=0.1, target_margin=torch.inf), steps=8, levels=3),
)


def world_texts(each: int) -> list[tuple[str, str]]:
    """Questions of the embedded world, each with its kind."""
    found: dict[str, str] = {}
    for kind in ASKS:
        rng, own = Random(f"tpp/{kind}/{SEED}"), dict[str, str]()
        for _ in range(20 * each):
            own.setdefault(ask(rng, kind).prompt, kind)
            if len(own) == each:
                break
        found |= own
    return list(found.items())


def banking_texts(data: Path) -> list[tuple[str, str]]:
    """Customers' questions with their intent, of the commonest intents."""
    with gzip.open(data / "classification" / "banking77_train.csv.gz", "rt", encoding="utf-8") as file:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(io.StringIO(file.read()))]
    common = [label for label, _ in Counter(label for _, label in rows).most_common(CLASSES)]
    return [(text, label) for text, label in rows if label in common]


def measure(base: str, data: Path | None, size: Size) -> dict[str, Any]:
    started = time.process_time()
    tokenizer = load_tokenizer(seed_path(base))
    model = load_model(seed_path(base), torch.device("cpu"), torch.float32).requires_grad_(False)
    site = Site(round(DEPTH * SEED_MODELS[base].n_layers))
    texts = world_texts(size.each) if data is None else banking_texts(data)
    rows = [list(tokenizer(text, add_special_tokens=False)["input_ids"])[:TOKENS] for text, _ in texts]
    acts = activations(model, rows, [site])[site]
    labelled = [LabelledText(own, label) for own, (_, label) in zip(acts, texts, strict=True) if len(own)]
    parts = split_rows(
        enumerate(labelled), seed=SEED, key=lambda row: str(row[0]), fractions=Fractions(0.4, 0, 0.2, 0.4)
    )
    fit = Fit(tuple(row for _, row in parts.fit))
    select = Select(tuple(row for _, row in parts.select))
    test = Test(tuple(row for _, row in parts.test))
    made = dictionary_of([row.acts for row in fit], site, seed=SEED, steps=size.dictionary_steps)
    probes = one_vs_rest(fit, site)
    found: dict[str, Any] = {}
    for label, probe in probes.items():
        chosen = by_probe_effect(made.dictionary, probe.weight, select, label, max(size.sizes))
        sizes = {n: ProbedTexts.of(test, label, made.dictionary, chosen.first(n).latents, site) for n in size.sizes}
        found[label] = {
            "sizes": {str(n): swept(probed, probes) for n, probed in sizes.items()},
            "study": studied(sizes[size.size], probes, size.config),
        }
    return {
        "base": base,
        "site": str(site),
        "texts": {"fit": len(fit), "select": len(select), "test": len(test)},
        "fvu": made.fvu,
        "l0": made.l0,
        "study of": size.size,
        "classes": found,
        "seconds": time.process_time() - started,
    }


def closed(probed: ProbedTexts, probe: LinearReadout, rows: Sequence[int]) -> dict[str, Tensor]:
    """Shortest perturbations of these rows without a search, in units of the median ‖h‖: free, and without moving S."""
    basis = Exact(probed.dictionary, probed.latents).basis(torch.device("cpu"))
    unit = float(probed.before.norm(dim=1).median())
    means = probed.after[list(rows)]
    return {"free": least_norm(probe, means) / unit, "exact": least_norm(probe, means, basis) / unit}


def swept(probed: ProbedTexts, probes: dict[str, LinearReadout]) -> dict[str, Any]:
    """What ablating so many latents does, and how long the shortest perturbation past it is."""
    probe, targeted = probes[probed.target], probed.targeted(probes)
    rows = probed.flipped(probe)
    lengths = closed(probed, probe, rows) if rows else {}
    return {
        "latents": len(probed.latents),
        "texts": int(probed.of_class.sum()),
        "flipped": len(rows),
        "score": targeted.score,
        "drop": targeted.drop[probed.target],
        "closed": {name: interval(epsilon50(own)) for name, own in lengths.items()},
    }


def studied(probed: ProbedTexts, probes: dict[str, LinearReadout], config: ReadoutConfig) -> dict[str, Any] | None:
    """All arms beside the closed form; None where fewer than two texts are flipped."""
    probe, rows = probes[probed.target], probed.flipped(probes[probed.target])
    if len(rows) < 2:
        return None
    study = stress_readout(probed.case(probes, rows, seed=SEED), config)
    known = closed(probed, probe, rows)
    arms = {arm.name: arm for arm in study.shortest}
    return {
        **study_fields(study),
        "closed": {
            name: {
                "epsilon50": interval(epsilon50(lengths)),
                "recovered": interval(clustered_share(lengths <= config.max_norm, rows)),
                "searched over it": interval(median(arms[name].lengths / lengths)),
            }
            for name, lengths in known.items()
        },
    }
