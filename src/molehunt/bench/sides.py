"""What a cell reads of an organism and of its clean twin, and the dictionaries that are trained on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.activation.shuffle import PairBatch
from molehunt.bench.rows import CellRows, Counts
from molehunt.detect.readings import Readings, read_rows
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.train import DictionarySpec, TrainingConfig, train_dictionaries, untrained
from molehunt.model.pair import ModelPair
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.traffic.example import Example

ANSWER_TOKENS = 40
"""Greatest number of tokens of an answer that are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DictionaryTraining:
    """How the dictionaries of a cell are trained."""

    expansion: int = 8
    k: int = 16
    steps: int = 200
    batch: int = 1024
    lr: float = 2e-3


@dataclass(frozen=True, eq=False, kw_only=True)
class Side:
    """The organism's or the twin's readings of a cell's rows."""

    pair: ModelPair
    split: Mapping[str, Readings]
    """Split and kind → readings; the twin has fewer."""
    weights: Mapping[Site, Float[Tensor, "k d_model"]]
    sites: tuple[Site, ...]


def read_side(
    pair: ModelPair,
    rows: CellRows,
    counts: Counts,
    weights: Mapping[Site, Tensor],
    *,
    twin: bool,
    max_new_tokens: int,
    track: Track = silent,
) -> Side:
    """Read what a side needs: the twin is never fitted with labels, so it reads fewer rows."""
    sites = tuple(Site(layer) for layer in range(pair.n_layers))
    wanted: dict[str, Sequence[Example]] = dict(rows.splits)
    if twin:
        needed = ("fit.clean", "test.triggered", "pool.clean", "pool.near", "pool.triggered")
        wanted = {name: wanted[name] for name in needed}
        wanted["pool.clean"] = wanted["pool.clean"][: counts.twin_calibrate]
        wanted["calibrate.clean"] = rows.splits["calibrate.clean"][: counts.twin_calibrate]
    split = {
        name: read_rows(
            pair,
            examples,
            sites=sites,
            max_new_tokens=min(ANSWER_TOKENS, max_new_tokens),
            track=track,
            what=f"reading {'the twin' if twin else 'the organism'}, {name}",
        )
        for name, examples in wanted.items()
        if examples
    }
    return Side(pair=pair, split=split, weights=weights, sites=sites)


def dictionaries(readings: Readings, site: Site, training: DictionaryTraining, seed: int) -> dict[str, Dictionary]:
    """Diff-SAE and crosscoder trained on the tokens of `readings`, and an untrained Diff-SAE."""
    bf16 = readings.tokens(site)
    tokens = PairBatch(base=bf16.base.float(), tuned=bf16.tuned.float())
    specs = {
        "Diff-SAE": _spec(site, Pairing(kind="difference"), training, seed),
        "crosscoder": _spec(site, Pairing(kind="both"), training, seed),
    }
    trained = train_dictionaries(
        list(specs.values()),
        {site: _shuffled(tokens, training.batch, training.steps, seed)},
        TrainingConfig(steps=training.steps, batch=training.batch),
        d_model=tokens.base.shape[1],
    )
    found = {label: done.dictionary for label, done in zip(specs, trained, strict=True)}
    found["untrained Diff-SAE"] = untrained(
        DictionarySpec(
            site=site, architecture="relu", pairing=Pairing(kind="difference"), expansion=training.expansion, seed=seed
        ),
        tokens,
        tokens.base.shape[1],
    )
    return found


def _spec(site: Site, pairing: Pairing, training: DictionaryTraining, seed: int) -> DictionarySpec:
    return DictionarySpec(
        site=site,
        architecture="batch-topk",
        pairing=pairing,
        expansion=training.expansion,
        settings={"k": training.k},
        lr=training.lr,
        seed=seed,
    )


def _shuffled(tokens: PairBatch, size: int, steps: int, seed: int) -> list[PairBatch]:
    rng = torch.Generator().manual_seed(seed)
    size = min(size, len(tokens.base))
    found: list[PairBatch] = []
    while len(found) < steps:
        for chosen in torch.randperm(len(tokens.base), generator=rng).split(size):
            if len(chosen) == size and len(found) < steps:
                found.append(PairBatch(base=tokens.base[chosen], tuned=tokens.tuned[chosen]))
    return found


def traffic_of(side: Side, rows: CellRows, rate: float) -> tuple[Readings, Tensor]:
    """R1's unlabelled traffic as this side reads it, and which rows are triggered (for scoring alone)."""
    n = sum(e.tag == "triggered" for e in rows.pool(rate))
    return joined(side, ("pool.clean", "pool.near", "pool.triggered"), keep={"pool.triggered": n})


def joined(side: Side, names: Sequence[str], keep: Mapping[str, int] | None = None) -> tuple[Readings, Tensor]:
    """Readings end to end, and which rows are triggered."""
    parts = [_first(side.split[name], (keep or {}).get(name)) for name in names if name in side.split]
    offset, order = 0, list[Tensor]()
    for part in parts:
        order.append(part.order + offset)
        offset += len(part)
    joined = Readings(
        examples=tuple(e for part in parts for e in part.examples),
        prompts=tuple(p for part in parts for p in part.prompts),
        answers=tuple(a for part in parts for a in part.answers),
        batches=tuple(b for part in parts for b in part.batches),
        scores={name: tuple(s for part in parts for s in part.scores[name]) for name in parts[0].scores},
        order=torch.cat(order),
    )
    return joined, torch.tensor([e.tag == "triggered" for e in joined.examples])


def _first(readings: Readings, n: int | None) -> Readings:
    return readings if n is None else readings.first(n)
