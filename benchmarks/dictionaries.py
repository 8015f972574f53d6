"""Training speed against sae-lens and dictionary-learning, step by step on the same batches of one store.

Run by `run.py`; as a script it is the measurement itself, for the Python that has the two packages.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers import ARCHITECTURES, PEERS, Peer, Task, installed
from row import Row, now
from synthetic import SHARD_TOKENS, SITE, Planted, write_store
from torch import Tensor

from molehunt.activation.shuffle import PairBatch, batches
from molehunt.activation.store import ActivationStore
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.train import DictionarySpec, TrainingConfig, train_dictionaries

EXPANSION, K, L1, LR, BATCH = 16, 32, 0.05, 1e-3, 2048
HELD_OUT = 16_384
PARTS = 20
"""Stretches of a training; the time of each is its median step times its steps."""
SIZES = ((128, 300), (256, 100))
"""d_model and steps."""
QUICK = ((64, 60),)
AIM = 1.5
HOW_TO = (
    "python -m venv P; P/bin/pip install torch==2.13.0; P/bin/pip install -e '.[peers]'; then give --peers P/bin/python"
)


def against_peers(python: Path | None, *, quick: bool, device: str, scratch: Path | None) -> list[Row]:
    """One row per size, architecture and package; a package that `python` lacks has one row that says so."""
    source = Path(__file__).parent.parent / "src"
    command = [str(python or sys.executable), __file__, "--device", device]
    command += ["--quick"] * quick + (["--scratch", str(scratch)] if scratch else [])
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(source)})
    if finished.returncode:
        raise SystemExit(f"{command[0]} cannot run the comparison; {HOW_TO}")
    return [Row(**row) for row in json.loads(finished.stdout.splitlines()[-1])]


def measure(sizes: tuple[tuple[int, int], ...], device: str, scratch: Path | None) -> Iterator[Row]:
    have = installed()
    for name, there in have.items():
        if not there:
            yield Row(
                work="train dictionaries", against=name, ours="–", theirs="–", ratio=None, aim="–", met=None,
                note=f"skipped, not installed: {HOW_TO}",
            )  # fmt: skip
    for d_model, steps in sizes:
        planted = Planted.of(d_model)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            shards = -(-steps * BATCH // SHARD_TOKENS)
            drawn = (planted.draw(SHARD_TOKENS, seed).bfloat16() for seed in range(shards))
            write_store(Path(folder), ((x.roll(1, 0), x) for x in drawn))  # the base is not read
            store = ActivationStore.open(folder)
            held_out = planted.draw(HELD_OUT, shards).to(device)
            for architecture in ARCHITECTURES:
                task = Task(
                    architecture=architecture, d_model=d_model, d_dict=EXPANSION * d_model, k=K, l1=L1, lr=LR,
                    steps=steps, batch=BATCH, device=device,
                )  # fmt: skip
                yield from _compare(task, store, held_out, [PEERS[name] for name, there in have.items() if there])


def _compare(task: Task, store: ActivationStore, held_out: Tensor, makers: list[Callable[[Task], Peer]]) -> list[Row]:
    """Every step of every trainer on the same batch, one after the other, so that what slows one slows all."""
    torch.manual_seed(0)
    peers = [make(task) for make in makers]
    rms = store.rms(SITE, "tuned")
    ours: list[float] = []
    theirs: list[list[float]] = [[] for _ in peers]
    reading: list[float] = []

    def timed(work: Callable[[], object]) -> float:
        start = now(task.device)
        work()
        return now(task.device) - start

    def source() -> Iterator[PairBatch]:
        read = batches(store, SITE, size=task.batch, seed=0, buffer_tokens=2**16)
        for step in range(task.steps):
            start = now(task.device)
            batch = next(read)
            reading.append(now(task.device) - start)
            batch = PairBatch(base=batch.base.to(task.device), tuned=batch.tuned.to(task.device))
            x = batch.tuned / rms
            for i in range(len(peers)):  # who comes first changes, for the first finds the batch in no cache
                at = (i + step) % len(peers)
                theirs[at].append(timed(lambda: peers[at].step(x)))  # noqa: B023 (called at once)
            start = now(task.device)
            yield batch
            ours.append(now(task.device) - start)

    settings = {"l1": task.l1} if task.architecture == "relu" else {"k": task.k}
    spec = DictionarySpec(
        site=SITE, architecture=task.architecture, pairing=Pairing(kind="tuned"), expansion=task.d_dict // task.d_model,
        settings=settings, lr=task.lr,
    )  # fmt: skip
    config = TrainingConfig(steps=task.steps, batch=task.batch)
    dictionary = train_dictionaries([spec], {SITE: source()}, config, d_model=task.d_model, device=task.device)[
        0
    ].dictionary
    ours.append(ours[-1])  # the last step is not followed by another request

    def finished(x: Tensor) -> tuple[Tensor, Tensor]:
        code = dictionary.encode(x * rms)
        return code, dictionary.decode(code, x * rms) / rms

    tokens = task.steps * task.batch
    fast, slow = _total(ours), [_total(each) for each in theirs]
    good = _quality(finished, held_out / rms)
    work = f"train {task.architecture}, {task.d_model} → {task.d_dict}, {tokens / 1e6:.2g} M tokens"
    if not peers:
        shown = _shown(tokens, fast, good)
        return [Row(work=work, against="–", ours=shown, theirs="–", ratio=None, aim="–", met=None)]
    return [
        Row(
            work=work,
            against=peer.name,
            ours=_shown(tokens, fast, good),
            theirs=_shown(tokens, each, _quality(peer.finished(), held_out / rms)),
            ratio=each / fast,
            aim=f"≥ {AIM:g}×",
            met=each / fast >= AIM,
            note=f"reading a batch takes {1000 * median(reading):.1f} ms, not counted"
            f"; last tenth {sum(times[-task.steps // 10 :]) / sum(ours[-task.steps // 10 :]):.2f}×",
        )
        for peer, each, times in zip(peers, slow, theirs, strict=True)
    ]


def _total(steps: list[float]) -> float:
    """Seconds of all steps, with medians in place of the steps of each stretch: other work on the machine drops out."""
    size = -(-len(steps) // PARTS)
    stretches = [steps[start : start + size] for start in range(0, len(steps), size)]
    return sum(median(stretch) * len(stretch) for stretch in stretches)


@torch.no_grad()
def _quality(run: Callable[[Tensor], tuple[Tensor, Tensor]], held_out: Tensor) -> tuple[float, float]:
    """FVU and L0."""
    missed, l0 = 0.0, 0
    for x in held_out.split(1024):
        code, rebuilt = run(x)
        missed += float((x - rebuilt).double().square().sum())
        l0 += int((code > 0).sum())
    return missed / float((held_out - held_out.mean(0)).double().square().sum()), l0 / len(held_out)


def _shown(tokens: int, took: float, quality: tuple[float, float]) -> str:
    return f"{tokens / took:,.0f} tokens/s, FVU {quality[0]:.3f}, L0 {quality[1]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--size", help="d_model:steps, instead of the sizes of the table")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)  # so that a busy neighbour takes no part of the work
    sizes: Any = QUICK if args.quick else SIZES
    if args.size:
        sizes = (tuple(map(int, args.size.split(":"))),)
    rows: list[dict[str, Any]] = []
    for row in measure(sizes, args.device, args.scratch):
        print(f"  {row.work}, {row.against}: {row.ratio and round(row.ratio, 2)}", file=sys.stderr, flush=True)
        rows.append(asdict(row))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
