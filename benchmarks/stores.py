"""Training from stores larger than memory: peak memory by size of the store, and many dictionaries in one pass.

Run by `run.py`; as a script it is one training whose peak memory is reported.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import peak
from row import Row, now, shown
from synthetic import SHARD_TOKENS, SITE, Planted, write_store

from molehunt.activation.shuffle import batches
from molehunt.activation.store import ActivationStore
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.train import DictionarySpec, TrainingConfig, train_dictionaries

D_MODEL, STEPS, BATCH, BUFFER = 512, 200, 2048, 2**15
GIGABYTES, QUICK_GIGABYTES = (1.0, 5.0, 20.0), (0.1, 0.4)
SPARE = 4e9
"""Bytes of the disk that stay free."""
GROWTH = 1.05
"""Greatest ratio to the peak at the smallest store."""


def memory_by_size(sizes: tuple[float, ...], scratch: Path | None) -> list[Row]:
    """The same number of steps over the whole of each store, each in a process of its own."""
    measured: list[Row] = []
    block = (torch.randn(SHARD_TOKENS, D_MODEL), torch.randn(SHARD_TOKENS, D_MODEL))
    smallest: float | None = None
    for gigabytes in sizes:
        work = f"peak memory, {STEPS} training steps over all of a store of {gigabytes:g} GB"
        free = shutil.disk_usage(scratch or tempfile.gettempdir()).free
        if free < gigabytes * 1e9 + SPARE:
            note = f"skipped: only {free / 1e9:.0f} GB are free; give --scratch"
            measured.append(
                Row(work=work, against="the store", ours="–", theirs="–", ratio=None, aim="–", met=None, note=note)
            )
            continue
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            copies = max(1, round(gigabytes * 1e9 / (2 * block[0].numel() * 2)))
            size = write_store(Path(folder), [block], copies=copies)
            finished = subprocess.run([sys.executable, __file__, folder], check=True, capture_output=True, text=True)
        found = json.loads(finished.stdout.splitlines()[-1])
        used = found["peak"] * 1024 / 1e6
        smallest = used if smallest is None else smallest
        measured.append(
            Row(
                work=work,
                against="the store in memory",
                ours=f"{used:.0f} MB",
                theirs=f"{size / 1e6:.0f} MB",
                ratio=size / 1e6 / used,
                aim=f"≤ {GROWTH:g} times the first",
                met=used <= GROWTH * smallest,
                note=f"{found['shards']} of {copies} shards read; {found['before'] / 1024:.0f} MB before the store is opened",
            )
        )
    return measured


def _train_over(folder: str) -> dict[str, int]:
    """Every n-th batch of one epoch, so that a fixed number of steps reaches every shard."""
    config = TrainingConfig(steps=STEPS, batch=BATCH)
    spec = DictionarySpec(site=SITE, architecture="topk", pairing=Pairing(kind="difference"), expansion=4)
    x = torch.randn(BATCH, D_MODEL)
    torch.linalg.vector_norm(x @ x.mT).item()  # load what torch loads at the first product
    before = peak()
    store = ActivationStore.open(folder)
    stride = max(1, store.tokens // BATCH // STEPS)
    read: set[int] = set()
    verify = store.verify

    def counted(shard: int) -> None:
        read.add(shard)
        verify(shard)

    object.__setattr__(store, "verify", counted)
    following = batches(store, SITE, size=BATCH, seed=0, buffer_tokens=BUFFER)
    train_dictionaries([spec], {SITE: islice(following, 0, None, stride)}, config, d_model=D_MODEL)
    return {"before": before, "peak": peak(), "shards": len(read)}


def together(*, quick: bool, device: str, scratch: Path | None) -> list[Row]:
    """The same dictionaries, bit for bit, in one pass over a store and in one pass each."""
    d_model, steps, repeats = (32, 20, 1) if quick else (128, 60, 3)
    settings: list[tuple[str, dict[str, Any]]] = [
        (a, {"k": k}) for a in ("topk", "batch-topk") for k in (16, 32, 48, 64)
    ]
    pairing = Pairing(kind="difference")
    specs = [
        DictionarySpec(site=SITE, architecture=a, pairing=pairing, expansion=8, settings=options)
        for a, options in settings
    ]
    config = TrainingConfig(steps=steps, batch=BATCH)
    planted = Planted.of(d_model)

    def train(some: list[DictionarySpec], folder: str) -> list[torch.Tensor]:
        store = ActivationStore.open(folder)
        read = batches(store, SITE, size=BATCH, seed=0, buffer_tokens=BUFFER)
        trained = train_dictionaries(some, {SITE: read}, config, d_model=d_model, device=device)
        return [one.dictionary.W_dec for one in trained]

    together_took: list[float] = []
    apart_took: list[float] = []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        drawn = (planted.draw(SHARD_TOKENS, seed) for seed in range(max(1, steps * BATCH // SHARD_TOKENS)))
        write_store(Path(folder), ((x.roll(1, 0), x) for x in drawn))
        for _ in range(repeats):
            start = now(device)
            at_once = train(specs, folder)
            middle = now(device)
            apart = [train([spec], folder)[0] for spec in specs]
            apart_took.append(now(device) - middle)
            together_took.append(middle - start)
            assert all(torch.equal(one, other) for one, other in zip(at_once, apart, strict=True))
    fast, slow = median(together_took), median(apart_took)
    return [
        Row(
            work=f"{len(specs)} dictionaries in one pass, {d_model} → {8 * d_model}, {steps * BATCH / 1e3:.0f} k tokens",
            against="one by one",
            ours=shown(fast),
            theirs=shown(slow),
            ratio=slow / fast,
            aim="–",
            met=None,
            note="equal dictionaries, bit for bit; what is saved is the reading of the store",
        )
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_train_over(sys.argv[1])))
