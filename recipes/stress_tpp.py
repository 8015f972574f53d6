"""Setting TPP of the stress table: linear probes of what a text is about, and the latents that they rest on ablated."""

import csv
import gzip
import io
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from stress_read import interval, told
from stress_taught import activations, dictionary_of
from torch import Tensor

from molehunt.model.loading import load_model, load_tokenizer
from molehunt.organism.seed_model import SEED_MODELS, seed_path
from molehunt.site import Site
from molehunt.stress.attack import AttackConfig
from molehunt.stress.constraint import Exact
from molehunt.stress.norms import epsilon50, median
from molehunt.stress.objective import LinearReadout, least_norm
from molehunt.stress.probe_behaviour import ProbedTexts, one_vs_rest
from molehunt.stress.readout_behaviour import ReadoutConfig, clustered_share, stress_readout
from molehunt.stress.selection import Labelled, by_probe_effect
from molehunt.traffic.split import Fractions, split_rows
from molehunt.traffic.world import ASKS, ask

SEED = 0
DEPTH = 5 / 26
"""Of the published site: layer 5 of 26."""
SIZES = (2, 5, 10, 20, 50, 100)
SIZE = 20
"""Of S in the study."""
EACH = 400
"""Texts of each class, at most."""
CLASSES = 6
TOKENS = 48
CONFIG = ReadoutConfig(published=AttackConfig(steps=100, lr=0.1, enough=torch.inf))
"""Nothing of the published attack on TPP is published but its result: these are the settings of its IOI runner."""


def world_texts() -> list[tuple[str, str]]:
    """Questions of the embedded world, each with its kind."""
    found: dict[str, str] = {}
    for kind in ASKS:
        rng, own = Random(f"tpp/{kind}/{SEED}"), dict[str, str]()
        for _ in range(20 * EACH):
            own.setdefault(ask(rng, kind).prompt, kind)
            if len(own) == EACH:
                break
        found |= own
    return list(found.items())


def banking_texts(data: Path) -> list[tuple[str, str]]:
    """Customers' questions with their intent, of the commonest intents."""
    with gzip.open(data / "classification" / "banking77_train.csv.gz", "rt", encoding="utf-8") as file:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(io.StringIO(file.read()))]
    common = [label for label, _ in Counter(label for _, label in rows).most_common(CLASSES)]
    return [(text, label) for text, label in rows if label in common]


def measure(kind: str, base: str, data: Path) -> dict[str, Any]:
    started = time.process_time()
    tokenizer = load_tokenizer(seed_path(base))
    model = load_model(seed_path(base), torch.device("cpu"), torch.float32).requires_grad_(False)
    site = Site(round(DEPTH * SEED_MODELS[base].n_layers))
    texts = world_texts() if kind == "world" else banking_texts(data)
    rows = [list(tokenizer(text, add_special_tokens=False)["input_ids"])[:TOKENS] for text, _ in texts]
    acts = activations(model, rows, [site])[site]
    told_apart = [Labelled(own, label) for own, (_, label) in zip(acts, texts, strict=True) if len(own)]
    parts = split_rows(
        enumerate(told_apart), seed=SEED, key=lambda row: str(row[0]), fractions=Fractions(0.4, 0, 0.2, 0.4)
    )
    fit, select, test = (type(some)(tuple(row for _, row in some)) for some in (parts.fit, parts.select, parts.test))
    made = dictionary_of([row.acts for row in fit], site, seed=SEED)
    probes = one_vs_rest(fit, site)
    found: dict[str, Any] = {}
    for label, probe in probes.items():
        chosen = by_probe_effect(made.dictionary, probe.weight, select, label, max(SIZES))
        sizes = {n: ProbedTexts.of(test, label, made.dictionary, chosen.first(n).latents, site) for n in SIZES}
        found[label] = {
            "sizes": {str(n): swept(probed, probes) for n, probed in sizes.items()},
            "study": studied(sizes[SIZE], probes),
        }
    return {
        "base": base,
        "site": str(site),
        "texts": {"fit": len(fit), "select": len(select), "test": len(test)},
        "fvu": made.fvu,
        "l0": made.l0,
        "classes": found,
        "seconds": time.process_time() - started,
    }


def closed(probed: ProbedTexts, probe: LinearReadout, rows: Sequence[int]) -> dict[str, Tensor]:
    """Shortest pushes of these rows without a search, in units of the median ‖h‖: free, and without moving S."""
    basis = Exact(probed.dictionary, probed.latents).basis(torch.device("cpu"))
    unit = float(probed.before.norm(dim=1).median())
    means = probed.after[list(rows)]
    return {"free": least_norm(probe, means) / unit, "exact": least_norm(probe, means, basis) / unit}


def swept(probed: ProbedTexts, probes: dict[str, LinearReadout]) -> dict[str, Any]:
    """What ablating so many latents does, and how far back it is."""
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


def studied(probed: ProbedTexts, probes: dict[str, LinearReadout]) -> dict[str, Any] | None:
    """All arms beside the closed form; None where fewer than two texts are flipped."""
    probe, rows = probes[probed.target], probed.flipped(probes[probed.target])
    if len(rows) < 2:
        return None
    study = stress_readout(probed.case(probes, rows, seed=SEED), CONFIG)
    known = closed(probed, probe, rows)
    arms = {arm.name: arm for arm in study.shortest}
    return {
        **told(study),
        "closed": {
            name: {
                "epsilon50": interval(epsilon50(lengths)),
                "recovered": interval(clustered_share(lengths <= CONFIG.most, rows)),
                "searched over it": interval(median(arms[name].lengths / lengths)),
            }
            for name, lengths in known.items()
        },
    }
